//! The `traceparent` header: trace context, parsing and printing.

use std::fmt;
use std::str::FromStr;

use super::header_error::HeaderError;

/// W3C trace context, version 00: a trace id and the id of the calling span.
///
/// One connection is one span. The flags are always sent as 00, because this process records no spans; received flags
/// are ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceParent(pub [u8; 16], pub [u8; 8]);

/// Length of version 00.
const LEN_BYTES: usize = "00-".len() + 32 + 1 + 16 + "-00".len();

impl TraceParent {
    /// Random ids. Not suitable as secrets.
    pub fn random() -> Self {
        // An id of zeros is invalid.
        Self(
            fastrand::u128(1..).to_be_bytes(),
            fastrand::u64(1..).to_be_bytes(),
        )
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (trace, span) = (u128::from_be_bytes(self.0), u64::from_be_bytes(self.1));
        write!(f, "00-{trace:032x}-{span:016x}-00")
    }
}

impl FromStr for TraceParent {
    type Err = HeaderError;

    fn from_str(s: &str) -> Result<Self, HeaderError> {
        // Later versions may append fields after a dash.
        let b = s.as_bytes();
        let cut = |from: usize, to: usize| b.get(from..to).ok_or(error("too short"));
        let has_dashes = [2, 35, 52].iter().all(|&at| b.get(at) == Some(&b'-'));
        let version = hex::<1>(cut(0, 2)?)?[0];
        let may_be_longer = version != 0 && b.get(LEN_BYTES) == Some(&b'-');
        if !has_dashes || version == 0xff || (b.len() != LEN_BYTES && !may_be_longer) {
            return Err(error("not of the form version-trace-span-flags"));
        }
        let (trace, span) = (hex::<16>(cut(3, 35)?)?, hex::<8>(cut(36, 52)?)?);
        hex::<1>(cut(53, 55)?)?;
        if trace == [0; 16] || span == [0; 8] {
            return Err(error("an id of zeros"));
        }
        Ok(Self(trace, span))
    }
}

/// Parses lower-case digits only, as the standard requires.
fn hex<const N: usize>(digits: &[u8]) -> Result<[u8; N], HeaderError> {
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        for digit in pair {
            let value = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'f' => digit - b'a' + 10,
                _ => return Err(error("not lower-case hexadecimal")),
            };
            *byte = *byte << 4 | value;
        }
    }
    Ok(out)
}

const fn error(problem: &'static str) -> HeaderError {
    HeaderError {
        header: "traceparent",
        problem,
    }
}
