//! Partial results of two numbers per channel that merge: mean and M2, or the two sums of a backward pass.

use crate::error::Error;
use crate::memory;
use crate::tree::{Merge, Tree};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// A pair of numbers, and how it merges.
pub(crate) trait Pair: Send + Sync {
    /// What merging takes of the two counts.
    type Weights: Copy;

    fn weights(left: f64, right: f64) -> Self::Weights;
    /// Merges `right` into `first` and `second`.
    fn merge(weights: Self::Weights, first: &mut f64, second: &mut f64, right: (f64, f64));
}

/// The pair of one channel (or one column of it) over `count` values: a leaf or node of the tree.
pub(crate) struct OfChannel<P> {
    count: f64,
    pub(crate) first: f64,
    pub(crate) second: f64,
    pair: PhantomData<P>,
}

impl<P> OfChannel<P> {
    pub(crate) fn new(count: f64, (first, second): (f64, f64)) -> Self {
        Self { count, first, second, pair: PhantomData }
    }

    pub(crate) fn into_pair(self) -> (f64, f64) {
        (self.first, self.second)
    }
}

impl<P: Pair> Merge for OfChannel<P> {
    fn merge(&mut self, right: &Self) {
        let weights = P::weights(self.count, right.count);
        P::merge(weights, &mut self.first, &mut self.second, (right.first, right.second));
        self.count += right.count;
    }
}

/// The pairs of some columns, each over `count` values: a leaf or node of the tree.
pub(crate) struct OfColumns<P> {
    pub(crate) count: f64,
    pub(crate) first: Vec<f64>,
    pub(crate) second: Vec<f64>,
    pair: PhantomData<P>,
}

impl<P: Pair> OfColumns<P> {
    /// Zeros, to be written by a kernel.
    pub(crate) fn zeros(count: usize, columns: usize) -> Result<Self, Error> {
        let (first, second) = (memory::zeros(columns)?, memory::zeros(columns)?);
        Ok(Self { count: count as f64, first, second, pair: PhantomData })
    }

    /// The pairs of the channels, each of which has `inner` columns.
    pub(crate) fn into_channels(self, inner: usize) -> Result<Vec<(f64, f64)>, Error> {
        let columns = memory::collected(self.first.iter().copied().zip(self.second.iter().copied()))?;
        if inner == 1 {
            return Ok(columns);
        }
        let merges = merges::<P>(inner, self.count)?;
        let (mut columns, mut channels) = (columns, memory::with_capacity(self.first.len() / inner)?);
        for columns in columns.chunks_mut(inner) {
            for &(left, right, weights) in &merges {
                let right = columns[right];
                let (first, second) = &mut columns[left];
                P::merge(weights, first, second, right);
            }
            channels.push(columns[0]);
        }
        Ok(channels)
    }
}

/// The merges of a tree over `leaves` pairs of `count` values each, in their order: which pair takes in which, with the weights.
fn merges<P: Pair>(leaves: usize, count: f64) -> Result<Vec<(usize, usize, P::Weights)>, Error> {
    /// A node that writes down what it takes in; its pair has the place of its first leaf.
    struct Node<'a, P: Pair> {
        place: usize,
        count: f64,
        merges: &'a RefCell<Vec<(usize, usize, P::Weights)>>,
    }
    impl<P: Pair> Merge for Node<'_, P> {
        fn merge(&mut self, right: &Self) {
            self.merges.borrow_mut().push((self.place, right.place, P::weights(self.count, right.count)));
            self.count += right.count;
        }
    }
    let merges = RefCell::new(memory::with_capacity(leaves)?);
    Tree::of((0..leaves).map(|place| Ok(Node::<P> { place, count, merges: &merges })))?;
    Ok(merges.into_inner())
}

impl<P: Pair> Merge for OfColumns<P> {
    fn merge(&mut self, right: &Self) {
        let weights = P::weights(self.count, right.count);
        let columns = self.first.iter_mut().zip(&mut self.second).zip(right.first.iter().zip(&right.second));
        for ((first, second), (&right_first, &right_second)) in columns {
            P::merge(weights, first, second, (right_first, right_second));
        }
        self.count += right.count;
    }
}

/// Two arrays of a number per channel, cut into groups of channels: each is written by the task that has the group.
pub(crate) struct Groups<'a> {
    channels: usize,
    groups: Vec<Mutex<(&'a mut [f64], &'a mut [f64])>>,
}

impl<'a> Groups<'a> {
    /// The arrays in groups of so many channels.
    pub(crate) fn new(first: &'a mut [f64], second: &'a mut [f64], channels: usize) -> Result<Self, Error> {
        let groups = first.chunks_mut(channels).zip(second.chunks_mut(channels)).map(Mutex::new);
        Ok(Self { channels, groups: memory::collected(groups)? })
    }

    /// Writes the pairs of the channels of one group.
    pub(crate) fn write(&self, channels: &Range<usize>, pairs: impl Iterator<Item = (f64, f64)>) {
        // A panic leaves numbers, if wrong ones.
        let mut group = self.groups[channels.start / self.channels].lock().unwrap_or_else(PoisonError::into_inner);
        let (first, second) = &mut *group;
        for ((first, second), pair) in first.iter_mut().zip(second.iter_mut()).zip(pairs) {
            (*first, *second) = pair;
        }
    }
}
