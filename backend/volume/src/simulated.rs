//! What only simulations ask for: promises of pools that are broken on purpose. Without `--cfg hawser_mutations` all of it is
//! constant and costs nothing.

pub use hawser_runtime::simulated::break_promise;
#[allow(unused_imports, reason = "as long as no promise names it")]
pub(crate) use hawser_runtime::simulated::is_broken;
