//! The engine as its users see it.

#![expect(clippy::unwrap_used, reason = "a test ends where its premises do")]

#[macro_use]
mod rig;

mod aio;
mod alone;
mod conformance;
mod faults;
mod foreign;
mod odd;
mod power;
mod seccomp;
mod sim;
mod space;
mod space_lanes;
mod uring;
