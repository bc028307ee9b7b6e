//! What the objects mean, one sentence at a time.

mod addresses;
mod endpoints;
mod pods;
mod properties;
mod services;
