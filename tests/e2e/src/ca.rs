//! The certificate authority: one that a test plays itself, to answer what no good one would
//! ([`HostileCa`]), and callers of the shipped one ([`Caller`]).

mod answer;
mod caller;
mod hostile;

pub use answer::Answer;
pub use caller::{Ask, Caller, Csr, calling, claims, signed, unix_time};
pub use hostile::{HostileCa, NAME};
