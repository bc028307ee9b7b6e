//! Start, run and stop.
