//! Which system calls may be made: those that the daemon, its libraries and the C library make.
//!
//! Any other is not carried out: it is answered with ENOSYS, as by a kernel that does not know it, and logged once by name. C
//! libraries fall back from calls that a kernel does not have, so that a newer one that prefers a newer call goes on; the
//! line in the log tells what to add. A thread that makes such a call with signals blocked is killed by the kernel with SIGSYS.
//!
//! There are no conditions on arguments but for `socket`: the kernel remembers that a call is allowed whatever its arguments
//! are, and asks no filter again.

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// The calls, by what they are for.
#[rustfmt::skip]
const ALLOWED: &[c_long] = &[
    // Input and output; files.
    libc::SYS_read, libc::SYS_write, libc::SYS_readv, libc::SYS_writev, libc::SYS_pread64, libc::SYS_pwrite64,
    libc::SYS_preadv, libc::SYS_pwritev, libc::SYS_preadv2, libc::SYS_pwritev2, libc::SYS_lseek, libc::SYS_close,
    libc::SYS_close_range, libc::SYS_openat, libc::SYS_openat2, libc::SYS_newfstatat, libc::SYS_fstat, libc::SYS_statx,
    libc::SYS_statfs, libc::SYS_fstatfs, libc::SYS_faccessat, libc::SYS_faccessat2, libc::SYS_readlinkat,
    libc::SYS_getdents64, libc::SYS_getcwd, libc::SYS_fallocate, libc::SYS_ftruncate, libc::SYS_fsync,
    libc::SYS_fdatasync, libc::SYS_sync_file_range, libc::SYS_flock, libc::SYS_fcntl, libc::SYS_ioctl, libc::SYS_dup,
    libc::SYS_dup3, libc::SYS_pipe2, libc::SYS_unlinkat, libc::SYS_renameat, libc::SYS_renameat2, libc::SYS_linkat,
    libc::SYS_mkdirat, libc::SYS_fchmod, libc::SYS_fchmodat, libc::SYS_fchown, libc::SYS_fchownat, libc::SYS_umask,
    libc::SYS_memfd_create, libc::SYS_fadvise64,
    // rdma-core waits for the nodes of devices.
    libc::SYS_inotify_init1, libc::SYS_inotify_add_watch, libc::SYS_inotify_rm_watch,
    // io_uring, and waiting.
    libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register, libc::SYS_eventfd2,
    libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_epoll_pwait2, libc::SYS_ppoll,
    libc::SYS_pselect6, libc::SYS_timerfd_create, libc::SYS_timerfd_settime, libc::SYS_timerfd_gettime,
    // Sockets; `socket` itself has a condition.
    libc::SYS_socketpair, libc::SYS_bind, libc::SYS_listen, libc::SYS_accept, libc::SYS_accept4, libc::SYS_connect,
    libc::SYS_shutdown, libc::SYS_sendto, libc::SYS_recvfrom, libc::SYS_sendmsg, libc::SYS_recvmsg, libc::SYS_sendmmsg,
    libc::SYS_recvmmsg, libc::SYS_getsockopt, libc::SYS_setsockopt, libc::SYS_getsockname, libc::SYS_getpeername,
    // Memory.
    libc::SYS_mmap, libc::SYS_munmap, libc::SYS_mremap, libc::SYS_mprotect, libc::SYS_madvise, libc::SYS_brk,
    libc::SYS_mlock, libc::SYS_mlock2, libc::SYS_munlock, libc::SYS_msync, libc::SYS_mincore, libc::SYS_membarrier,
    libc::SYS_get_mempolicy, libc::SYS_mbind,
    // Threads, and the end. A thread is a `clone`; what it could make instead of one is held by the same filter.
    libc::SYS_clone, libc::SYS_clone3, libc::SYS_set_robust_list, libc::SYS_get_robust_list, libc::SYS_set_tid_address,
    libc::SYS_rseq, libc::SYS_futex, libc::SYS_exit, libc::SYS_exit_group, libc::SYS_gettid, libc::SYS_getpid,
    libc::SYS_getppid, libc::SYS_sched_yield, libc::SYS_sched_getaffinity, libc::SYS_sched_setaffinity,
    libc::SYS_sched_getparam, libc::SYS_sched_getscheduler, libc::SYS_getcpu, libc::SYS_prctl, libc::SYS_prlimit64,
    libc::SYS_getrlimit, libc::SYS_getrusage, libc::SYS_restart_syscall,
    // Signals: our own faults, and the way to a core.
    libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn, libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigpending, libc::SYS_rt_sigqueueinfo, libc::SYS_rt_tgsigqueueinfo, libc::SYS_sigaltstack,
    libc::SYS_tgkill, libc::SYS_tkill,
    // Who, when, where, and chance.
    libc::SYS_getuid, libc::SYS_geteuid, libc::SYS_getgid, libc::SYS_getegid, libc::SYS_getgroups, libc::SYS_uname,
    libc::SYS_sysinfo, libc::SYS_clock_gettime, libc::SYS_clock_getres, libc::SYS_clock_nanosleep, libc::SYS_nanosleep,
    libc::SYS_gettimeofday, libc::SYS_getrandom,
];

/// The older calls of the same kind, which only this architecture has.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const ALLOWED_HERE: &[c_long] = &[
    libc::SYS_open, libc::SYS_stat, libc::SYS_lstat, libc::SYS_access, libc::SYS_readlink, libc::SYS_unlink,
    libc::SYS_rmdir, libc::SYS_rename, libc::SYS_mkdir, libc::SYS_chmod, libc::SYS_chown, libc::SYS_lchown,
    libc::SYS_link, libc::SYS_dup2, libc::SYS_pipe, libc::SYS_poll, libc::SYS_select, libc::SYS_epoll_create,
    libc::SYS_epoll_wait, libc::SYS_eventfd, libc::SYS_time, libc::SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[c_long] = &[];

/// What we talk to: front ends and the API, targets and hosts, and the kernel about its addresses (`getaddrinfo`).
const FAMILIES: [libc::c_int; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

fn filter() -> Result<BpfProgram, seccompiler::Error> {
    let allowed = ALLOWED.iter().chain(ALLOWED_HERE).map(|call| (*call, Vec::new()));
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = allowed.collect();
    let family = |family: &libc::c_int| {
        let family = u64::from(family.unsigned_abs());
        let is = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, family)?;
        SeccompRule::new(vec![is])
    };
    rules.insert(libc::SYS_socket, FAMILIES.iter().map(family).collect::<Result<_, _>>()?);
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Trap,
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into()?,
    )?;
    Ok(filter.try_into()?)
}

/// From now on this thread, and those that it starts, make no other call.
pub(super) fn restrict() -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| format!("seccomp: {error}");
    answer_refused_calls().map_err(|error| failed(&error))?;
    let filter = filter().map_err(|error| failed(&error))?;
    match seccompiler::apply_filter(&filter) {
        Ok(()) => log::info!("seccomp: {} system calls are allowed", ALLOWED.len() + ALLOWED_HERE.len() + 1),
        // A kernel without it, or a container that forbids it.
        Err(error) => log::warn!("seccomp: not to be had here: {error}"),
    }
    Ok(())
}

fn answer_refused_calls() -> std::io::Result<()> {
    // SAFETY: an all-zero sigaction is one without flags and with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = refused as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
    // SAFETY: `action` is whole, and its handler does only what a signal handler may.
    let set = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) };
    if set < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// The part of `siginfo_t` that the kernel fills for SIGSYS (`struct siginfo`, `_sigsys`, on 64-bit machines).
#[repr(C)]
struct SigsysInfo {
    signal: i32,
    errno: i32,
    code: i32,
    _padding: i32,
    address: usize,
    call: i32,
    architecture: u32,
}

/// `si_code` of a call that a filter has refused; a SIGSYS that somebody sends has another.
const SYS_SECCOMP: i32 = 1;

/// One bit for each call that has been logged.
static LOGGED: [AtomicU64; 8] = [const { AtomicU64::new(0) }; 8];

extern "C" fn refused(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a siginfo_t that lives through the handler, whose beginning is laid out like this for SIGSYS.
    let info = unsafe { &*info.cast::<SigsysInfo>() };
    if info.code != SYS_SECCOMP {
        return;
    }
    // SAFETY: the kernel gives the interrupted thread's context, ours to change until we return; the call was not made, and
    // its result is what this register holds then.
    unsafe { set_result(context.cast::<libc::ucontext_t>(), -i64::from(libc::ENOSYS)) };
    let Ok(call) = usize::try_from(info.call) else { return };
    if let Some(word) = LOGGED.get(call / 64) {
        let bit = 1 << (call % 64);
        if word.fetch_or(bit, Ordering::Relaxed) & bit != 0 {
            return;
        }
    }
    log_refused(call);
}

#[cfg(target_arch = "x86_64")]
unsafe fn set_result(context: *mut libc::ucontext_t, result: i64) {
    const RAX: usize = libc::REG_RAX as usize;
    // SAFETY: the caller's promise.
    unsafe { (*context).uc_mcontext.gregs[RAX] = result };
}

#[cfg(target_arch = "aarch64")]
unsafe fn set_result(context: *mut libc::ucontext_t, result: i64) {
    // SAFETY: the caller's promise.
    unsafe { (*context).uc_mcontext.regs[0] = result.cast_unsigned() };
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
unsafe fn set_result(_: *mut libc::ucontext_t, _: i64) {}

/// Calls that somebody who has taken the process over would make, for the log; others are shown by their number.
const NAMES: [(c_long, &str); 12] = [
    (libc::SYS_execve, "execve"),
    (libc::SYS_execveat, "execveat"),
    (libc::SYS_ptrace, "ptrace"),
    (libc::SYS_process_vm_readv, "process_vm_readv"),
    (libc::SYS_process_vm_writev, "process_vm_writev"),
    (libc::SYS_mount, "mount"),
    (libc::SYS_setuid, "setuid"),
    (libc::SYS_bpf, "bpf"),
    (libc::SYS_unshare, "unshare"),
    (libc::SYS_setns, "setns"),
    (libc::SYS_socket, "socket"),
    (libc::SYS_sethostname, "sethostname"),
];

/// Writes the line without what a signal handler may not use: no lock, no allocation.
fn log_refused(call: usize) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    let mut rest = call;
    while rest > 0 || at == digits.len() {
        at -= 1;
        digits[at] = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
    }
    let name = NAMES
        .iter()
        .find(|(known, _)| usize::try_from(*known) == Ok(call))
        .map_or("no name here", |(_, name)| name);
    let parts: [&[u8]; 5] = [
        b"hawser: seccomp: system call ",
        &digits[at..],
        b" (",
        name.as_bytes(),
        b") is not one that this daemon makes: refused with ENOSYS. Please report it; [daemon] sandbox = false allows all\n",
    ];
    let mut line = [0; 256];
    let mut len = 0;
    for part in parts {
        let take = part.len().min(line.len() - len);
        line[len..len + take].copy_from_slice(&part[..take]);
        len += take;
    }
    // SAFETY: `line` holds `len` bytes. Nothing can be done about a log that cannot be written.
    unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), len) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a thread of its own, which takes the filter with it.
    #[test]
    fn other_calls_are_not_made_and_the_process_goes_on() {
        let restricted = std::thread::spawn(|| {
            restrict().unwrap();
            // SAFETY: plain system calls; the names are literals.
            unsafe {
                let before = libc::syscall(libc::SYS_prctl, libc::PR_GET_SECCOMP);
                assert_eq!(before, 2, "a filter is there");
                for _ in 0..3 {
                    let path = c"/bin/true".as_ptr();
                    let none: [*const libc::c_char; 1] = [std::ptr::null()];
                    assert_eq!(libc::syscall(libc::SYS_execve, path, none.as_ptr(), none.as_ptr()), -1);
                    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENOSYS));
                }
                assert_eq!(libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0), -1);
                assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENOSYS));
            }
            // What is needed goes on: files, sockets, threads.
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("f"), "x").unwrap();
            std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_millis(1))).join().unwrap();
        });
        restricted.join().unwrap();
        let bit = |call: c_long| {
            let call = usize::try_from(call).unwrap();
            LOGGED[call / 64].load(Ordering::Relaxed) >> (call % 64) & 1
        };
        assert_eq!((bit(libc::SYS_execve), bit(libc::SYS_socket), bit(libc::SYS_write)), (1, 1, 0));
    }

    #[test]
    fn a_line_of_the_log_says_what_happened() {
        // Nothing but the digits is made by hand.
        assert!(std::mem::size_of::<SigsysInfo>() <= std::mem::size_of::<libc::siginfo_t>());
        assert_eq!(std::mem::offset_of!(SigsysInfo, call), 24);
        for call in [0, 59, 1234] {
            log_refused(call);
        }
    }
}
