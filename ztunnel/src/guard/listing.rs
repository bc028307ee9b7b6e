//! The guard's table as `nft` lists it, taken apart: the rules as text, the elements of sets as
//! addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// One table.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Listing {
    /// Everything but the elements of sets.
    pub(super) rules: String,
    /// The elements of each set that has any.
    pub(super) elements: BTreeMap<String, BTreeSet<IpAddr>>,
}

impl Listing {
    /// Takes a listing apart. What is not an address among the elements is left out, and so makes
    /// the set differ from what it should be.
    pub(super) fn parse(text: &str) -> Self {
        let mut listing = Self::default();
        let (mut set, mut inside) = (String::new(), false);
        for line in text.lines() {
            let words = line.trim();
            if let Some(name) = words
                .strip_prefix("set ")
                .and_then(|rest| rest.strip_suffix(" {"))
            {
                set = name.to_string();
            }
            let elements = words.strip_prefix("elements = {");
            inside |= elements.is_some();
            if inside {
                let list = elements.unwrap_or(words);
                inside = !list.contains('}');
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
    fn rules_and_elements_are_told_apart() {
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
