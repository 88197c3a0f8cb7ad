//! Opaque handles: numbers in the shape of pointers, looked up in a table of what is live.
//!
//! A handle is never followed, and its number never used again, so one that was destroyed, that is of another kind or that
//! never was is refused whenever it comes. What a call uses stays alive until it returns, whatever is destroyed meanwhile.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::status::{Failure, qkv_status::*};

/// The live things of one kind.
#[derive(Debug)]
pub(crate) struct Handles<T> {
    live: RwLock<BTreeMap<usize, Arc<T>>>,
    kind: &'static str,
}

/// The last number given out, of any kind. Steps of 16 look like what an allocator gives.
static LAST: AtomicUsize = AtomicUsize::new(0x1000);

impl<T> Handles<T> {
    /// None; `kind` names the argument in messages.
    pub(crate) const fn new(kind: &'static str) -> Self {
        Self { live: RwLock::new(BTreeMap::new()), kind }
    }

    /// A new handle of `thing`, stored at `to`.
    ///
    /// # Safety
    /// `to` must be NULL, misaligned or valid for a write.
    pub(crate) unsafe fn give<H>(
        &self,
        to: *mut *mut H,
        make: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<(), Failure> {
        if to.is_null() {
            return Err(Failure::null(self.kind));
        }
        if !to.is_aligned() {
            let what = format!("{}: at {:#x}, expected the address of a pointer", self.kind, to.addr());
            return Err(Failure::new(QKV_ERROR_MISALIGNED, what));
        }
        let thing = Arc::new(make()?);
        let number = LAST.fetch_add(16, Ordering::Relaxed) + 16;
        self.live.write().unwrap_or_else(PoisonError::into_inner).insert(number, thing);
        // SAFETY: not NULL, aligned, and the caller's promise.
        unsafe { to.write(core::ptr::without_provenance_mut(number)) };
        Ok(())
    }

    /// What a handle stands for.
    pub(crate) fn get<H>(&self, handle: *const H) -> Result<Arc<T>, Failure> {
        if handle.is_null() {
            return Err(Failure::null(self.kind));
        }
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        live.get(&handle.addr()).cloned().ok_or_else(|| self.dead(handle.addr()))
    }

    /// Ends a handle; NULL is nothing to end.
    pub(crate) fn end<H>(&self, handle: *mut H) -> Result<(), Failure> {
        if handle.is_null() {
            return Ok(());
        }
        let ended = self.live.write().unwrap_or_else(PoisonError::into_inner).remove(&handle.addr());
        ended.map(drop).ok_or_else(|| self.dead(handle.addr()))
    }

    fn dead(&self, given: usize) -> Failure {
        let what =
            format!("{}: handle {given:#x}, expected one that was created and not destroyed", self.kind);
        Failure::new(QKV_ERROR_HANDLE, what)
    }
}

fn poisoned<T>(_: PoisonError<T>) -> Failure {
    Failure::new(QKV_ERROR_INTERNAL, "cache: an error inside qkv has left it half-written")
}

/// Waits until nobody changes the thing.
pub(crate) fn read<T>(thing: &RwLock<T>) -> Result<RwLockReadGuard<'_, T>, Failure> {
    thing.read().map_err(poisoned)
}

/// Waits until nobody uses the thing.
pub(crate) fn write<T>(thing: &RwLock<T>) -> Result<RwLockWriteGuard<'_, T>, Failure> {
    thing.write().map_err(poisoned)
}
