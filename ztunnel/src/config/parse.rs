//! Values of the command line that only this daemon has: how each is written.

use std::collections::BTreeSet;

use component::flags::FlagErrors;
use spiffe::TrustDomain;

/// Parses the value of `--trust-domain-aliases`: trust domains separated by commas.
pub(super) fn trust_domain_aliases(
    errors: &mut FlagErrors,
    names: Option<&str>,
) -> Vec<TrustDomain> {
    let parse = |name: String| match TrustDomain::new(&name) {
        Ok(domain) => Some(domain),
        Err(error) => {
            errors.push(format!("--trust-domain-aliases {name:?}: {error}"));
            None
        }
    };
    let names = list(names.unwrap_or_default());
    names.into_iter().filter_map(parse).collect()
}

/// Parses a number of threads, a percentage of the cores (rounded up), or 0 for all of them.
pub(super) fn threads(text: &str, cores: usize) -> Result<usize, String> {
    /// A larger number is a typing mistake.
    const MAX_THREADS: usize = 512;
    let number = |text: &str| {
        text.parse::<usize>()
            .map_err(|_| "a number, or a percentage such as 50%, is needed".to_string())
    };
    let threads = match text.strip_suffix('%') {
        Some(percent) => cores.saturating_mul(number(percent)?).div_ceil(100),
        None => number(text)?,
    };
    match threads {
        0 => Ok(cores),
        1..=MAX_THREADS => Ok(threads),
        _ => Err(format!("more than {MAX_THREADS}")),
    }
}

/// Parses `enforce` (true) or `off` (false).
pub(super) fn is_enforced(text: &str) -> Result<bool, &'static str> {
    match text {
        "enforce" => Ok(true),
        "off" => Ok(false),
        _ => Err("it must be enforce or off"),
    }
}

/// Parses names separated by commas.
pub(super) fn list(text: &str) -> BTreeSet<String> {
    text.split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .map(str::to_string)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::threads;

    #[test]
    fn threads_are_a_number_a_share_of_the_cores_or_all_of_them() {
        assert_eq!(threads("3", 8), Ok(3));
        assert_eq!(threads("25%", 8), Ok(2));
        assert_eq!(threads("10%", 8), Ok(1), "a share is at least one thread");
        assert_eq!(threads("0", 8), Ok(8));
        assert!(threads("100000", 8).is_err());
        assert!(threads("-1", 8).is_err());
    }
}
