//! What only simulations ask for: promises broken on purpose, and a target that is not like ours. Without
//! `--cfg hawser_mutations` all of it is constant and costs nothing.

pub use hawser_runtime::simulated::break_promise;
pub(crate) use hawser_runtime::simulated::is_broken;

#[cfg(hawser_mutations)]
thread_local! {
    static FOREIGN: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
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

/// Makes targets on this thread like any other, or like ours again. Returns whether it can: only with
/// `--cfg hawser_mutations`.
pub fn set_foreign(foreign: bool) -> bool {
    #[cfg(hawser_mutations)]
    FOREIGN.set(foreign);
    !foreign || cfg!(hawser_mutations)
}
