//! What every engine must do, written against the interface of `hbone` alone.
//!
//! A scenario is a function generic over an [`Engine`]. To hold a second engine to the same rules, implement the trait
//! for it and name it in one more `conformance!` line; with different engines on the two sides it becomes an interop
//! suite.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test fails by panic"
)]

mod engine;
mod limits;
mod pool;
mod tcp;
mod trust;
mod world;

use engine::H2;

/// One test per scenario and engine.
macro_rules! conformance {
    ($engine:ident: $($module:ident { $($name:ident),* $(,)? })*) => {
        $(
            mod $module {
                $(
                    #[test]
                    fn $name() {
                        crate::world::run(crate::$module::$name::<crate::$engine>());
                    }
                )*
            }
        )*
    };
}

mod h2 {
    conformance! { H2:
        tcp {
            bytes_arrive_in_order_and_are_counted_in_both_directions,
        }
    }
}
