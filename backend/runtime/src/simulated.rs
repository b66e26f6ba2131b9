//! Promises that simulations break on purpose, to see that they find it out. Without `--cfg hawser_mutations` all of it is
//! constant and costs nothing. The layers above say which promises there are, where they keep them.

#[cfg(hawser_mutations)]
thread_local! {
    static BROKEN: std::cell::Cell<Option<&'static str>> = const { std::cell::Cell::new(None) };
}

/// Whether the promise of this name is broken on this thread.
#[cfg(hawser_mutations)]
#[must_use]
pub fn is_broken(name: &str) -> bool {
    BROKEN.get() == Some(name)
}

/// Whether the promise of this name is broken on this thread: never.
#[cfg(not(hawser_mutations))]
#[inline]
#[must_use]
pub const fn is_broken(_: &str) -> bool {
    false
}

/// Breaks a promise on this thread from now on, in place of another one; does nothing without `--cfg hawser_mutations`.
pub fn break_promise(name: Option<&str>) {
    #[cfg(hawser_mutations)]
    BROKEN.set(name.map(|name| &*Box::leak(name.to_owned().into_boxed_str())));
    let _ = name;
}
