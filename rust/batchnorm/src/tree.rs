//! The fixed tree in which the partial results of blocks are combined.
//!
//! The shape of the tree depends on the number of blocks alone, so results do not depend on which thread computed which
//! block (contract 3).

use crate::error::Error;
use crate::memory;

/// A partial result over some blocks, which merges with that of the blocks after them.
pub(crate) trait Merge {
    fn merge(&mut self, right: &Self);
}

/// A binary tree of merges, built leaf by leaf in the order of a binary counter; its shape depends on the number of leaves.
///
/// A tree whose leaves are the results of trees over 2^k leaves each (the last may have fewer) gives the same result as
/// one tree over all leaves. So spans of 2^k blocks can be computed separately.
pub(crate) struct Tree<P> {
    nodes: Vec<(u32, P)>,
}

impl<P: Merge> Tree<P> {
    pub(crate) fn new() -> Self {
        Self { nodes: Vec::new() }
    }

    /// Takes in the result of the next leaf.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub(crate) fn push(&mut self, mut leaf: P) -> Result<(), Error> {
        let mut level = 0;
        while let Some((_, mut left)) = self.nodes.pop_if(|(l, _)| *l == level) {
            left.merge(&leaf);
            (leaf, level) = (left, level + 1);
        }
        memory::push(&mut self.nodes, (level, leaf))
    }

    /// The result over all leaves.
    #[allow(clippy::expect_used, reason = "an empty channel has no tree, and its result must not go missing")]
    pub(crate) fn finish(mut self) -> P {
        let (_, mut right) = self.nodes.pop().expect("a tree has at least one leaf");
        while let Some((_, mut left)) = self.nodes.pop() {
            left.merge(&right);
            right = left;
        }
        right
    }

    /// The result over `leaves`, in their order; there must be at least one.
    ///
    /// # Errors
    /// [`Error::NoMemory`], and the first of a leaf.
    pub(crate) fn of(leaves: impl IntoIterator<Item = Result<P, Error>>) -> Result<P, Error> {
        let mut tree = Self::new();
        leaves.into_iter().try_for_each(|leaf| tree.push(leaf?))?;
        Ok(tree.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::Range;

    /// A partial result that records how it was merged.
    impl Merge for String {
        fn merge(&mut self, right: &Self) {
            *self = format!("({self}{right})");
        }
    }

    fn leaves(range: Range<usize>) -> impl Iterator<Item = Result<String, Error>> {
        range.map(|i| Ok(format!("{i},")))
    }

    #[test]
    fn the_tree_is_the_same_however_it_is_split() {
        assert_eq!(Tree::of(leaves(0..5)).as_deref(), Ok("(((0,1,)(2,3,))4,)"));
        for n in 1..70 {
            let whole = Tree::of(leaves(0..n));
            for span in [1, 2, 4, 8, 16, 32, 64] {
                let spans = (0..n).step_by(span).map(|s| Tree::of(leaves(s..n.min(s + span))));
                assert_eq!(Tree::of(spans), whole, "{n} leaves in spans of {span}");
            }
        }
    }
}
