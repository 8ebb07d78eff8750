//! What ranks of a group hold, however they are joined.

use std::path::Path;

use crate::course::{Kind, Left, alone};

/// Holds that all ranks of a group find the bits that one process finds which takes all shares itself. `train` is what each rank of a
/// group of so many finds, in a folder of its own.
pub(crate) fn holds_the_bits_of_one(train: impl Fn(Kind, usize, &Path) -> Vec<Left>) {
    for (kind, count) in
        [(Kind::Tokens, 2), (Kind::Tokens, 3), (Kind::Labels, 2), (Kind::Preferences, 2), (Kind::Whole, 2)]
    {
        let folder = tempfile::tempdir().unwrap();
        let (found, expected) = (train(kind, count, folder.path()), alone(kind, count));
        assert_eq!(found.len(), count);
        for (rank, found) in found.iter().enumerate() {
            let what = format!("{kind:?}, rank {rank} of {count}");
            assert!(*found == expected, "{what}: {:?} and {:?}", found.losses, expected.losses);
        }
        assert!(expected.losses.len() > 4 && !expected.validations.is_empty());
    }
}
