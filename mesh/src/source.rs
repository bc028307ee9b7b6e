//! Where objects come from.

mod folder;

pub use folder::{FolderError, FolderSource};
