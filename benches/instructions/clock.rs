//! Virtual time: each read of a clock advances it by a microsecond.
//!
//! Valgrind slows a program down about fifty times, and the factor depends on the load of the machine. With
//! the real clock, the work that is done each second (lookups, events of `/logs`, sweeps) would be divided
//! among fewer or more requests. With this clock a request takes some 40 µs on every machine, as in a real
//! server.
//!
//! The definition of `clock_gettime` replaces that of the C library for all code of this program: the
//! standard library, Tokio and the allocator.

use nix::libc::{c_int, clockid_t, timespec};
use std::sync::atomic::{AtomicI64, Ordering};

/// 2026-11-22, in nanoseconds since the Unix epoch. All clocks show the same time.
const START_NS: i64 = 1_795_305_600_000_000_000;
const READ_NS: i64 = 1_000;

static NOW_NS: AtomicI64 = AtomicI64::new(START_NS);

#[expect(unsafe_code, reason = "it replaces a function of the C library")]
#[unsafe(no_mangle)]
extern "C" fn clock_gettime(_: clockid_t, now: *mut timespec) -> c_int {
    let ns = NOW_NS.fetch_add(READ_NS, Ordering::Relaxed);
    // SAFETY: callers of `clock_gettime` pass a valid pointer.
    unsafe { now.write(timespec { tv_sec: ns / 1_000_000_000, tv_nsec: ns % 1_000_000_000 }) };
    0
}
