//! The engine as its users see it.

#![expect(clippy::unwrap_used, reason = "a test ends where its premises do")]

mod aio;
mod alone;
mod conformance;
mod odd;
mod rig;
mod seccomp;
mod space;
mod uring;
