//! Suites that keep the CPU busy: floods, bulk transfers and thousands of connections. The runner skips `serial::` in the
//! parallel run and then runs it alone on one thread, so that these suites delay no other.

mod http2_floods;
mod load;
mod log;
mod policy_churn;
mod tcp_pressure;
