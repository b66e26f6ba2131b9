//! What only simulations ask for: promises broken on purpose, and a target that is not like ours. Without
//! `--cfg hawser_mutations` all of it is constant and costs nothing.

#[cfg(hawser_mutations)]
thread_local! {
    static BROKEN: std::cell::Cell<Option<&'static str>> = const { std::cell::Cell::new(None) };
    static FOREIGN: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Whether the promise of this name is broken on this thread.
#[cfg(hawser_mutations)]
pub(crate) fn is_broken(name: &str) -> bool {
    BROKEN.get() == Some(name)
}

/// Whether the promise of this name is broken on this thread: never.
#[cfg(not(hawser_mutations))]
#[inline]
pub(crate) const fn is_broken(_: &str) -> bool {
    false
}

/// Whether targets on this thread promise only what every target does, and reset no other controllers.
#[cfg(hawser_mutations)]
pub(crate) fn is_foreign() -> bool {
    FOREIGN.get()
}

/// Whether targets on this thread promise only what every target does, and reset no other controllers: never.
#[cfg(not(hawser_mutations))]
#[inline]
pub(crate) const fn is_foreign() -> bool {
    false
}

/// Breaks a promise on this thread from now on, in place of another one; does nothing without `--cfg hawser_mutations`.
pub fn break_promise(name: Option<&str>) {
    #[cfg(hawser_mutations)]
    BROKEN.set(name.map(|name| &*Box::leak(name.to_owned().into_boxed_str())));
    let _ = name;
}

/// Makes targets on this thread like any other, or like ours again. Returns whether it can: only with
/// `--cfg hawser_mutations`.
pub fn set_foreign(foreign: bool) -> bool {
    #[cfg(hawser_mutations)]
    FOREIGN.set(foreign);
    !foreign || cfg!(hawser_mutations)
}
