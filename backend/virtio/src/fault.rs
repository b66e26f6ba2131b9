//! Faults: what happens at SIGBUS, SIGSEGV, SIGILL and SIGABRT.
//!
//! A SIGBUS within a region of guest memory is the front end's doing (it truncated its file): the handler puts a page
//! of zeroes there and marks the region, and the session ends. Everything else is our own death: the crash record is
//! marked ([`crate::crash`]), and the signal goes its way.
//!
//! Invariant: what the handler touches is atomics and plain system calls only.

use crate::crash;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};

/// Entries in one piece of the table.
const CHUNK: usize = 512;
/// More mappings than a process can have (`vm.max_map_count` is 65,530 where nobody has changed it).
const CHUNKS_MAX: usize = 1024;

#[derive(Debug)]
struct Entry {
    /// 0: free; 1: being changed; else the first byte.
    start: AtomicUsize,
    end: AtomicUsize,
    faulted: AtomicBool,
}

impl Entry {
    const fn free() -> Entry {
        Entry { start: AtomicUsize::new(0), end: AtomicUsize::new(0), faulted: AtomicBool::new(false) }
    }
}

/// The table, in pieces that are made when they are needed and never go: the handler may look at any time.
static CHUNKS: [AtomicPtr<[Entry; CHUNK]>; CHUNKS_MAX] =
    [const { AtomicPtr::new(ptr::null_mut()) }; CHUNKS_MAX];
/// How many faults there were: a cheap look before a closer one.
static FAULTS: AtomicU64 = AtomicU64::new(0);

/// A mapping whose SIGBUS is survived.
#[derive(Debug)]
pub(crate) struct Guard {
    entry: &'static Entry,
}

impl Guard {
    /// Watches `len` mapped bytes; `None` when the table is full.
    pub(crate) fn new(start: usize, len: usize) -> Option<Guard> {
        install();
        let claim =
            |entry: &&Entry| entry.start.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let entry = CHUNKS.iter().find_map(|chunk| made(chunk).iter().find(claim))?;
        entry.faulted.store(false, Ordering::Relaxed);
        entry.end.store(start + len, Ordering::Relaxed);
        entry.start.store(start, Ordering::Release);
        Some(Guard { entry })
    }

    /// Whether there was a SIGBUS.
    pub(crate) fn faulted(&self) -> bool {
        self.entry.faulted.load(Ordering::Acquire)
    }

    /// Ends the watch. Called once, before the mapping goes.
    pub(crate) fn release(&self) {
        self.entry.end.store(0, Ordering::Relaxed);
        self.entry.start.store(0, Ordering::Release);
    }
}

/// The piece of the table at this place, made if it is not there.
fn made(chunk: &AtomicPtr<[Entry; CHUNK]>) -> &'static [Entry; CHUNK] {
    let mut found = chunk.load(Ordering::Acquire);
    if found.is_null() {
        let fresh = Box::into_raw(Box::new([const { Entry::free() }; CHUNK]));
        match chunk.compare_exchange(found, fresh, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => found = fresh,
            Err(other) => {
                // SAFETY: made above, and nobody else has seen it.
                drop(unsafe { Box::from_raw(fresh) });
                found = other;
            }
        }
    }
    // SAFETY: what is in the table came from a box and is never freed.
    unsafe { &*found }
}

/// How many faults in guest memory this process has survived.
pub(crate) fn count() -> u64 {
    FAULTS.load(Ordering::Acquire)
}

/// Marks the region of `address` and puts a page of zeroes there. Runs in the signal handler.
fn survive(address: usize) -> bool {
    let chunks =
        CHUNKS.iter().map(|chunk| chunk.load(Ordering::Acquire)).take_while(|chunk| !chunk.is_null());
    // SAFETY: what is in the table came from a box and is never freed.
    for entry in chunks.flat_map(|chunk| unsafe { &*chunk }) {
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
