//! The verbs driver: a library that is opened when RDMA is first asked for.
//!
//! Owns: where it is looked for, and whether it is ours. Must not know: what is done with it.

use hawser_verbs_abi::{BUILD, DeviceAttributes, ENTRY, Entry, FILE, Table};
use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Names the file instead of looking for it.
pub const VARIABLE: &str = "HAWSER_VERBS";
/// Where it is when it is not beside the daemon.
const FOLDERS: [&str; 4] =
    ["/usr/lib/hawser", "/usr/lib64/hawser", "/usr/local/lib/hawser", "/opt/hawser/lib"];

static OPENED: OnceLock<&'static Table> = OnceLock::new();
/// One thread opens it.
static OPENING: Mutex<()> = Mutex::new(());

/// The driver's table; opens the library the first time.
///
/// # Errors
/// One line: what is missing, and what to do.
pub fn table() -> Result<&'static Table, String> {
    if let Some(table) = OPENED.get() {
        return Ok(table);
    }
    let _one = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(table) = OPENED.get() {
        return Ok(table);
    }
    let table = open(&find()?)?;
    Ok(OPENED.get_or_init(|| table))
}

/// From now on this is the driver: for tests, and only before one was opened.
pub fn install(table: &'static Table) {
    let _ = OPENED.set(table);
}

fn find() -> Result<PathBuf, String> {
    if let Some(named) = std::env::var_os(VARIABLE) {
        return Ok(PathBuf::from(named));
    }
    let beside = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned));
    let folders: Vec<PathBuf> = beside.into_iter().chain(FOLDERS.map(PathBuf::from)).collect();
    folders.iter().map(|folder| folder.join(FILE)).find(|path| path.exists()).ok_or_else(|| {
        let looked: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
        format!(
            "RDMA needs {FILE}, which is not in {}; install it there, or name it in ${VARIABLE}",
            looked.join(", ")
        )
    })
}

fn open(path: &Path) -> Result<&'static Table, String> {
    let shown = path.display();
    let name =
        CString::new(path.as_os_str().as_bytes()).map_err(|_| format!("{shown}: a zero in its name"))?;
    // SAFETY: a C string. The library's initialisers are rdma-core's, which may be run at any time; it is never closed.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        let why = last_error();
        // The loader names what is missing first: "librdmacm.so.1: cannot open shared object file: ...".
        let install = if why.contains("librdmacm") || why.contains("libibverbs") {
            "; install rdma-core (Debian: librdmacm1 ibverbs-providers)"
        } else {
            ""
        };
        return Err(format!("RDMA: {shown} cannot be opened: {why}{install}"));
    }
    // SAFETY: a library that is open, and a C string.
    let entry = unsafe { libc::dlsym(library, ENTRY.as_ptr()) };
    if entry.is_null() {
        return Err(format!("RDMA: {shown} is no verbs driver of hawser's; install the one of this build"));
    }
    // SAFETY: the symbol of this name is an `Entry`, in every build.
    let entry: Entry = unsafe { std::mem::transmute(entry) };
    let mut ours = [0; 16];
    ours.copy_from_slice(&BUILD.as_bytes()[..16]);
    let mut own = [0; 16];
    // SAFETY: 16 bytes each.
    let table = unsafe { entry(&raw const ours, &raw mut own) };
    // SAFETY: null, or a table of the driver's, which stays as long as the library, of the layout that this build has.
    unsafe { table.as_ref() }.ok_or_else(|| {
        format!(
            "RDMA: {shown} is of build {}, and this daemon is of build {BUILD}; install both from one build",
            String::from_utf8_lossy(&own)
        )
    })
}

fn last_error() -> String {
    // SAFETY: a C string of the loader's, or null; copied before the next call.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() {
            return "the loader does not say why".to_owned();
        }
        CStr::from_ptr(text).to_string_lossy().into_owned()
    }
}

/// This host's RDMA devices. Slow: never on a reactor's thread.
pub(crate) fn devices(table: &Table) -> Vec<DeviceAttributes> {
    const MAX: usize = 32;
    let mut found = [DeviceAttributes::NONE; MAX];
    // SAFETY: room for as many.
    let count = unsafe { (table.devices)(found.as_mut_ptr(), u32::try_from(MAX).unwrap_or(0)) };
    found[..usize::try_from(count).unwrap_or(0).min(MAX)].to_vec()
}

/// A device's name.
pub(crate) fn name(attributes: &DeviceAttributes) -> String {
    let bytes: Vec<u8> = attributes.name.iter().copied().take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_not_there_or_not_ours_is_named() {
        let error = open(Path::new("/nonexistent/libhawser_verbs.so")).err().unwrap();
        assert!(error.contains("/nonexistent/libhawser_verbs.so cannot be opened"), "{error}");
        let error = open(Path::new("libc.so.6")).err().unwrap();
        assert!(error.contains("is no verbs driver of hawser's"), "{error}");
    }

    /// A driver of another build, made on the spot: it says which, and gives no table.
    const OTHER: &str = r#"
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn hawser_verbs_entry(_: *const [u8; 16], own: *mut [u8; 16]) -> *const u8 {
            unsafe { *own = *b"0123456789abcdef" };
            core::ptr::null()
        }"#;

    #[test]
    fn a_driver_of_another_build_is_refused_and_named() {
        let folder = std::env::temp_dir().join(format!("hawser-driver-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (source, library) = (folder.join("other.rs"), folder.join(FILE));
        std::fs::write(&source, OTHER).unwrap();
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let built = std::process::Command::new(rustc)
            .args(["--edition=2024", "--crate-type=cdylib", "--crate-name=other", "-Cpanic=abort", "-o"])
            .args([&library, &source])
            .status()
            .unwrap();
        assert!(built.success());
        let error = open(&library).err().unwrap();
        std::fs::remove_dir_all(folder).unwrap();
        let want = format!(
            "is of build 0123456789abcdef, and this daemon is of build {BUILD}; install both from one"
        );
        assert!(error.contains(&want) && !error.contains('\n'), "{error}");
    }
}
