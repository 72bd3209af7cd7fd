//! Values that each process makes for itself, so that a forked child does not use its parent's.

use arc_swap::{ArcSwapOption, Guard};
use std::mem::forget;
use std::ops::Deref;
use std::sync::Arc;

/// A value that each process makes at first use, including a forked child.
///
/// A child must not use its parent's value: the value may refer to threads that the child does not have, and one of them
/// may have held a lock in it when the process forked, which then stays locked for ever. For the same reason the value is
/// not behind a lock, but behind a pointer that is replaced atomically.
pub struct PerProcess<T>(ArcSwapOption<Owned<T>>);

/// A value and the process that made it.
pub struct Owned<T> {
    process: u32,
    value: T,
}

impl<T> Deref for Owned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> PerProcess<T> {
    /// An empty place; the value is made at first use.
    #[allow(clippy::new_without_default, reason = "only ever made in a static, by a constant function")]
    pub const fn new() -> Self {
        Self(ArcSwapOption::const_empty())
    }

    /// The value of this process, made by `make` if there is none yet.
    ///
    /// In a forked child, `make` is given the parent's value: it may read the parts that never change, but must not take a
    /// lock. If several threads make the value at the same time, all get that of the first.
    ///
    /// # Errors
    /// The errors of `make`.
    pub fn get<E>(&self, make: impl FnOnce(Option<&T>) -> Result<T, E>) -> Result<Arc<Owned<T>>, E> {
        let process = std::process::id();
        let found = self.0.load_full();
        if let Some(own) = &found
            && own.process == process
        {
            return Ok(Arc::clone(own));
        }
        let made = Arc::new(Owned { process, value: make(found.as_ref().map(|of_parent| &of_parent.value))? });
        let before = self.0.compare_and_swap(&found, Some(Arc::clone(&made)));
        match Guard::into_inner(before) {
            Some(first) if first.process == process => Ok(first),
            of_parent => {
                forget(of_parent); // dropping it would take its locks and signal its threads
                Ok(made)
            }
        }
    }

    /// The value of this process, or in a forked child that of its parent, of which it may read the parts that never change.
    pub fn found(&self) -> Option<Arc<Owned<T>>> {
        self.0.load_full()
    }

    /// Replaces the value of this process.
    pub fn set(&self, value: T) {
        let process = std::process::id();
        let old = self.0.swap(Some(Arc::new(Owned { process, value })));
        if old.as_ref().is_some_and(|old| old.process != process) {
            forget(old); // as above
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]
    use super::*;
    use std::convert::Infallible;

    #[test]
    fn the_first_value_stays_until_it_is_replaced() {
        let place = PerProcess::new();
        let get = |value: u32| *place.get(|_| Ok::<_, Infallible>(value)).unwrap().deref().deref();
        assert_eq!((get(1), get(2)), (1, 1));
        place.set(3);
        assert_eq!(get(4), 3);
        assert_eq!(PerProcess::<u32>::new().get(|_| Err("no")).err(), Some("no"));
    }

    #[test]
    fn the_value_of_a_parent_is_leaked() {
        let parent = std::process::id() + 1; // any other number will do
        let of_parent = Arc::new(Owned { process: parent, value: Arc::new(5) });
        let inner = Arc::downgrade(&of_parent.value);
        let place = PerProcess(ArcSwapOption::new(Some(of_parent)));
        let own = place.get(|found| Ok::<_, Infallible>(Arc::new(**found.unwrap() + 1))).unwrap();
        assert_eq!(***own, 6);
        assert_eq!(inner.strong_count(), 1, "the parent's value was dropped");
        place.set(Arc::new(7));
        assert_eq!(inner.strong_count(), 1, "the parent's value was dropped");
    }
}
