//! Loads and stores on memory that is shared with a guest or with our successor.
//!
//! Everything that must survive our death in order (the in-flight log, the used ring) is stored through here, one store
//! at a time, so that a test can stop the world after any one of them (`test::die_after`).
//!
//! A store that others may see has release order: on x86 that keeps the compiler from moving it and costs nothing. For a
//! successor that maps the memory after our death that is enough: what the processor has executed, the next process sees.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

macro_rules! access {
    ($load:ident, $store:ident, $type:ty, $atomic:ty) => {
        /// Loads with acquire order.
        ///
        /// # Safety
        /// `from` is aligned and mapped.
        #[inline]
        #[allow(dead_code, reason = "one family of functions for all widths")]
        pub(crate) unsafe fn $load(from: *const $type) -> $type {
            // SAFETY: the caller's promise; atomics allow for others' accesses.
            unsafe { <$atomic>::from_ptr(from.cast_mut()) }.load(Ordering::Acquire)
        }

        /// Stores with release order.
        ///
        /// # Safety
        /// `to` is aligned, mapped and writable.
        #[inline]
        pub(crate) unsafe fn $store(to: *mut $type, value: $type) {
            #[cfg(test)]
            if test::dead() {
                return;
            }
            // SAFETY: as above.
            unsafe { <$atomic>::from_ptr(to) }.store(value, Ordering::Release);
        }
    };
}

access!(load_u8, store_u8, u8, AtomicU8);
access!(load_u16, store_u16, u16, AtomicU16);
access!(load_u32, store_u32, u32, AtomicU32);
access!(load_u64, store_u64, u64, AtomicU64);

/// Sets bits of a byte that others change too; what was stored before is seen by whoever sees them.
///
/// # Safety
/// `to` is mapped and writable.
#[inline]
pub(crate) unsafe fn or_u8(to: *mut u8, bits: u8) {
    #[cfg(test)]
    if test::dead() {
        return;
    }
    // SAFETY: the caller's promise; a byte is always aligned; atomics allow for others' accesses.
    unsafe { AtomicU8::from_ptr(to) }.fetch_or(bits, Ordering::AcqRel);
}

/// Death at any store, for tests: what comes after the last store that is allowed does not reach memory.
#[cfg(test)]
pub(crate) mod test {
    use std::cell::Cell;

    thread_local! {
        static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
    }

    /// Lets `stores` more stores through on this thread, and none after them; `None`: all.
    pub(crate) fn die_after(stores: Option<u64>) {
        LEFT.with(|left| left.set(stores));
    }

    /// How many of the allowed stores are left.
    pub(crate) fn left() -> Option<u64> {
        LEFT.with(Cell::get)
    }

    pub(crate) fn dead() -> bool {
        LEFT.with(|left| match left.get() {
            None => false,
            Some(0) => true,
            Some(count) => {
                left.set(Some(count - 1));
                false
            }
        })
    }
}
