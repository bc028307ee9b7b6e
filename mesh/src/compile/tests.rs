//! The model that objects compile to.

mod addresses;
mod endpoints;
mod pods;
mod properties;
mod services;
