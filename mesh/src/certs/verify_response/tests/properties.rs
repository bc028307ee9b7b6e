//! Properties that hold for every modification of a response.

use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;

/// Shared by all cases: generating a CA for each would dominate the run time.
static CA: LazyLock<TestCa> = LazyLock::new(TestCa::new);

proptest! {
    /// A leaf with one changed byte, or a truncated leaf, is rejected, or its bytes are unchanged.
    #[test]
    fn a_modified_leaf_is_rejected(
        position in any::<usize>(),
        value in any::<u8>(),
        cut in any::<usize>(),
    ) {
        let mut issued = CA.issue(|_| {});
        let original = issued.chain[0].to_vec();
        let mut bytes = original.clone();
        let position = position % bytes.len();
        bytes[position] = value;
        if cut % 4 == 0 {
            bytes.truncate(cut % bytes.len());
        }
        issued.chain[0] = bytes.into();
        if let Ok(certificate) = verify_response(issued, &web(), &CA.bundle(), now()) {
            prop_assert_eq!(certificate.chain[0].to_vec(), original);
        }
    }
}
