//! Faults: what happens at SIGBUS, SIGSEGV, SIGILL and SIGABRT.
//!
//! A SIGBUS within a region of guest memory is the front end's doing (it truncated its file): the handler puts a page
//! of zeroes there and marks the region, and the session ends. Everything else is our own death: the crash record is
//! marked ([`crate::crash`]), and the signal goes its way.
//!
//! Invariant: what the handler touches is atomics and plain system calls only.

use crate::crash;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Regions that can be mapped at once in this process.
const REGIONS_MAX: usize = 8192;

struct Entry {
    /// 0: free; 1: being changed; else the first byte.
    start: AtomicUsize,
    end: AtomicUsize,
    faulted: AtomicBool,
}

static REGIONS: [Entry; REGIONS_MAX] = [const {
    Entry { start: AtomicUsize::new(0), end: AtomicUsize::new(0), faulted: AtomicBool::new(false) }
}; REGIONS_MAX];
/// One more than the highest entry that was ever used.
static USED: AtomicUsize = AtomicUsize::new(0);
/// How many faults there were: a cheap look before a closer one.
static FAULTS: AtomicU64 = AtomicU64::new(0);

/// A mapping whose SIGBUS is survived.
#[derive(Debug)]
pub(crate) struct Guard {
    index: usize,
}

impl Guard {
    /// Watches `len` mapped bytes; `None` when the table is full.
    pub(crate) fn new(start: usize, len: usize) -> Option<Guard> {
        install();
        let index = REGIONS.iter().position(|entry| {
            entry.start.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })?;
        let entry = &REGIONS[index];
        entry.faulted.store(false, Ordering::Relaxed);
        entry.end.store(start + len, Ordering::Relaxed);
        entry.start.store(start, Ordering::Release);
        USED.fetch_max(index + 1, Ordering::AcqRel);
        Some(Guard { index })
    }

    /// Whether there was a SIGBUS.
    pub(crate) fn faulted(&self) -> bool {
        REGIONS[self.index].faulted.load(Ordering::Acquire)
    }

    /// Ends the watch. Called once, before the mapping goes.
    pub(crate) fn release(&self) {
        let entry = &REGIONS[self.index];
        entry.end.store(0, Ordering::Relaxed);
        entry.start.store(0, Ordering::Release);
    }
}

/// How many faults in guest memory this process has survived.
pub(crate) fn count() -> u64 {
    FAULTS.load(Ordering::Acquire)
}

/// Marks the region of `address` and puts a page of zeroes there. Runs in the signal handler.
fn survive(address: usize) -> bool {
    for entry in &REGIONS[..USED.load(Ordering::Acquire)] {
        let (start, end) = (entry.start.load(Ordering::Acquire), entry.end.load(Ordering::Acquire));
        if start <= 1 || address < start || address >= end {
            continue;
        }
        let put_zeroes = |from: usize, len: usize| {
            // SAFETY: replaces pages of a mapping that is ours and whose content is lost. Every user of it goes through raw
            // pointers and expects any bytes.
            let mapped = unsafe {
                libc::mmap(
                    from as *mut libc::c_void,
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    -1,
                    0,
                )
            };
            mapped != libc::MAP_FAILED
        };
        let page = 4096;
        // A mapping of huge pages can only be replaced as a whole.
        if put_zeroes(address & !(page - 1), page) || put_zeroes(start, end - start) {
            entry.faulted.store(true, Ordering::Release);
            FAULTS.fetch_add(1, Ordering::AcqRel);
            return true;
        }
    }
    false
}

const SIGNALS: [i32; 4] = [libc::SIGBUS, libc::SIGSEGV, libc::SIGILL, libc::SIGABRT];

/// What was installed before us: Rust's own handler tells of stack overflows.
static BEFORE: [AtomicUsize; SIGNALS.len()] = [const { AtomicUsize::new(0) }; SIGNALS.len()];

/// Installs the handlers, once.
pub(crate) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        for (signal, before) in SIGNALS.into_iter().zip(&BEFORE) {
            // SAFETY: all-zero is a valid `sigaction`; the handler has the signature that SA_SIGINFO asks for and touches
            // only what is safe in a handler.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                let mut old: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handle as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                libc::sigemptyset(&raw mut action.sa_mask);
                libc::sigaction(signal, &raw const action, &raw mut old);
                if old.sa_flags & libc::SA_SIGINFO != 0 {
                    before.store(old.sa_sigaction, Ordering::Release);
                }
            }
        }
    });
}

extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo to an SA_SIGINFO handler.
    let (code, address, sender) = unsafe { ((*info).si_code, (*info).si_addr() as usize, (*info).si_pid()) };
    // Faults have positive codes; others were sent by someone: by us (abort, raise), or from outside.
    let fault = code > 0;
    if signal == libc::SIGBUS && fault && survive(address) {
        return;
    }
    // SAFETY: plain system call.
    let ours = fault || sender == unsafe { libc::getpid() };
    if ours {
        crash::mark(signal);
    }
    let before = SIGNALS.iter().position(|other| *other == signal).map_or(0, |index| {
        // Once: what comes next is final.
        BEFORE[index].swap(0, Ordering::AcqRel)
    });
    if before != 0 {
        // SAFETY: it was installed with SA_SIGINFO, so it has this signature.
        let before: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
            unsafe { std::mem::transmute(before) };
        before(signal, info, context);
        if fault {
            // Back to where it happened: Rust's handler has put the default action in our place.
            return;
        }
    }
    // SAFETY: all-zero is SIG_DFL; raising a signal is safe in a handler.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        if !fault {
            libc::raise(signal);
        }
    }
}
