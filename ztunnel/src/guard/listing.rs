//! How a listing of the guard's table is parsed: the rules as text, the elements of sets as
//! addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// The content of one table.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Listing {
    /// The listing without the elements of sets.
    pub(super) rules: String,
    /// The elements of each set that has any.
    pub(super) elements: BTreeMap<String, BTreeSet<IpAddr>>,
}

impl Listing {
    /// Parses a listing. Elements that are no addresses are skipped, so that such a set differs
    /// from the applied one.
    pub(super) fn parse(text: &str) -> Self {
        let mut listing = Self::default();
        let (mut set, mut in_elements) = (String::new(), false);
        for line in text.lines() {
            let words = line.trim();
            if let Some(name) = words
                .strip_prefix("set ")
                .and_then(|rest| rest.strip_suffix(" {"))
            {
                set = name.to_string();
            }
            let elements = words.strip_prefix("elements = {");
            in_elements |= elements.is_some();
            if in_elements {
                let list = elements.unwrap_or(words);
                in_elements = !list.contains('}');
                let addresses = list
                    .split([' ', ',', '}'])
                    .filter_map(|word| word.parse::<IpAddr>().ok());
                listing
                    .elements
                    .entry(set.clone())
                    .or_default()
                    .extend(addresses);
            } else {
                listing.rules.push_str(line);
                listing.rules.push('\n');
            }
        }
        listing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listing_is_split_into_rules_and_elements() {
        let text = "table inet t {\n\tset a {\n\t\ttype ipv4_addr\n\t\telements = { 10.0.0.1, 10.0.0.2,\n\
                    \t\t\t     10.0.0.3 }\n\t}\n\n\tset b {\n\t\ttype ipv6_addr\n\t}\n\n\tset c {\n\t\ttype \
                    ipv6_addr\n\t\telements = { fd00::1 }\n\t}\n\n\tchain d {\n\t\tip saddr @a drop\n\t}\n}\n";
        let listing = Listing::parse(text);
        let set = |addresses: &[&str]| addresses.iter().map(|ip| ip.parse().unwrap()).collect();
        let expected: BTreeMap<String, BTreeSet<IpAddr>> = [
            ("a".to_string(), set(&["10.0.0.1", "10.0.0.2", "10.0.0.3"])),
            ("c".to_string(), set(&["fd00::1"])),
        ]
        .into();
        assert_eq!(listing.elements, expected);
        assert!(
            listing.rules.contains("\t\tip saddr @a drop\n") && !listing.rules.contains("10.0.0")
        );
    }
}
