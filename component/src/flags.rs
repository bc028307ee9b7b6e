//! Values of command-line flags and environment variables: how each kind is written, and how all
//! mistakes are reported together.
//!
//! `clap` reads every value as text. [`FlagErrors`] then parses the values and collects the errors,
//! so that an operator corrects a manifest in one go instead of one restart per mistake.

use std::ffi::OsStr;
use std::fmt::{self, Display};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use clap::error::ErrorKind;
use spiffe::TrustDomain;
use tracing_subscriber::EnvFilter;

/// Exit code of a command line that cannot be used (`EX_USAGE`, sysexits.h).
pub const EXIT_USAGE: u8 = 64;

/// Reads the command line of this process. Without a usable one, prints the error, the help or the
/// version.
///
/// # Errors
/// Fails with the code to exit with: success after help and version, [`EXIT_USAGE`] otherwise.
pub fn parse_arguments<A: Parser>() -> Result<A, ExitCode> {
    A::try_parse().map_err(|error| {
        // If the terminal is gone, the error cannot be reported.
        let _ = error.print();
        match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
            _ => ExitCode::from(EXIT_USAGE),
        }
    })
}

/// Every mistake of a command line, one line each.
#[derive(Debug, thiserror::Error)]
pub struct ConfigError(Vec<String>);

impl Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the configuration cannot be used:")?;
        self.0.iter().try_for_each(|error| writeln!(f, "  {error}"))
    }
}

/// The mistakes found so far.
///
/// After a mistake its methods return a placeholder, so that the remaining values are checked too.
/// [`into_result`](Self::into_result) then fails, and the placeholder is not used.
#[derive(Debug, Default)]
pub struct FlagErrors(Vec<String>);

impl FlagErrors {
    /// Adds a mistake.
    pub fn push(&mut self, error: impl Into<String>) {
        self.0.push(error.into());
    }

    /// Reports the flags whose value is empty. A variable that a manifest sets to nothing is a
    /// mistake in the manifest and does not select the default.
    pub fn reject_empty(&mut self, values: &[(&str, Option<&OsStr>)]) {
        for (flag, value) in values {
            if *value == Some(OsStr::new("")) {
                self.push(format!("{flag} is empty; leave it out if it has no value"));
            }
        }
    }

    /// The value of a flag that has no default.
    pub fn required<T: Default>(&mut self, flag: &str, value: Option<T>) -> T {
        value.unwrap_or_else(|| {
            self.push(format!("{flag} is required"));
            T::default()
        })
    }

    /// The parsed value of a flag, or `default` if the flag is not set.
    pub fn parse<T, E: Display>(
        &mut self,
        flag: &str,
        value: Option<String>,
        default: T,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> T {
        let Some(value) = value else { return default };
        parse(&value).unwrap_or_else(|error| {
            self.push(format!("{flag} {value:?}: {error}"));
            default
        })
    }

    /// The value of `--trust-domain`.
    pub fn trust_domain(&mut self, name: &str) -> TrustDomain {
        TrustDomain::new(name).unwrap_or_else(|error| {
            self.push(format!("--trust-domain {name:?}: {error}"));
            placeholder_trust_domain()
        })
    }

    /// Fails if there was a mistake.
    ///
    /// # Errors
    /// Fails with all mistakes.
    pub fn into_result(self) -> Result<(), ConfigError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(ConfigError(self.0))
        }
    }
}

#[expect(clippy::expect_used, reason = "the name is a valid constant")]
fn placeholder_trust_domain() -> TrustDomain {
    TrustDomain::new("invalid").expect("seven lower-case letters are a trust domain")
}

/// Parses a duration as Go writes it, and so Istio's variables: `5s`, `500ms`, `1h30m`. Numbers are
/// whole; the units are `ms`, `s`, `m` and `h`.
///
/// # Errors
/// Fails on any other text and on durations shorter than `min`.
pub fn duration(text: &str, min: Duration) -> Result<Duration, String> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit());
        let (number, tail) = rest.split_at(number_end.unwrap_or(rest.len()));
        let unit_end = tail.find(|c: char| c.is_ascii_digit());
        let (unit, tail) = tail.split_at(unit_end.unwrap_or(tail.len()));
        let number: u32 = number
            .parse()
            .map_err(|_| "a number and a unit are needed, such as 5s".to_owned())?;
        let unit = match unit {
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            "h" => Duration::from_secs(3600),
            other => return Err(format!("the unit {other:?} is none of ms, s, m, h")),
        };
        total = unit
            .checked_mul(number)
            .and_then(|part| total.checked_add(part))
            .ok_or("it is too long")?;
        rest = tail;
    }
    if text.is_empty() || total < min {
        return Err(format!("it must be at least {min:?}"));
    }
    Ok(total)
}

/// Parses an IP address with a port. `localhost` means 127.0.0.1.
///
/// # Errors
/// Fails on any other text.
pub fn socket_addr(text: &str) -> Result<SocketAddr, String> {
    let address = match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => text.to_owned(),
    };
    address
        .parse()
        .map_err(|_| "an address and a port are needed, such as 127.0.0.1:15000".to_owned())
}

/// Parses a loopback address with a port.
///
/// # Errors
/// Fails on other addresses and any other text.
pub fn loopback_addr(text: &str) -> Result<SocketAddr, String> {
    let address = socket_addr(text)?;
    if !address.ip().is_loopback() {
        return Err("it must be a loopback address".to_owned());
    }
    Ok(address)
}

/// Checks log levels in the syntax of [`EnvFilter`], such as `info,access=off`, and returns them
/// unchanged.
///
/// # Errors
/// Fails on any other text.
pub fn log_filter(text: &str) -> Result<String, tracing_subscriber::filter::ParseError> {
    EnvFilter::try_new(text).map(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_in_go() {
        let parse = |text| duration(text, Duration::ZERO);
        assert_eq!(parse("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse("24h"), Ok(Duration::from_secs(86_400)));
        assert_eq!(parse("0s"), Ok(Duration::ZERO));
        for wrong in ["", "5", "s", "5d", "-1s", "1.5s", "99999999999s", "5s "] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn duration_below_the_minimum_is_an_error() {
        let error = duration("9s", Duration::from_secs(10)).unwrap_err();
        assert_eq!(error, "it must be at least 10s");
    }

    #[test]
    fn localhost_is_the_ipv4_loopback_address() {
        assert_eq!(
            socket_addr("localhost:80").unwrap().to_string(),
            "127.0.0.1:80"
        );
        assert!(loopback_addr("localhost:80").is_ok());
        assert!(loopback_addr("10.0.0.1:80").is_err());
        assert!(socket_addr("localhost").is_err());
    }

    #[test]
    fn all_mistakes_are_reported_together() {
        let mut errors = FlagErrors::default();
        errors.reject_empty(&[("--a", Some(OsStr::new(""))), ("--b", None)]);
        let _: String = errors.required("--c", None);
        errors.parse("--d", Some("5".into()), Duration::ZERO, |text| {
            duration(text, Duration::ZERO)
        });
        errors.trust_domain("Not A Domain");
        let message = errors.into_result().unwrap_err().to_string();
        for flag in [
            "--a is empty",
            "--c is required",
            "--d \"5\"",
            "--trust-domain",
        ] {
            assert!(message.contains(flag), "{flag} is not in\n{message}");
        }
        assert_eq!(message.lines().count(), 5, "{message}");
        assert!(FlagErrors::default().into_result().is_ok());
    }
}
