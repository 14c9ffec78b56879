//! The store on real files, with both backends.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed, its helpers too")]

mod apart;
mod buffers;
mod carried;
mod closed;
mod displaced;
mod examination;
mod folder;
mod full;
mod generations;
mod killed;
mod leftovers;
mod optimizer;
mod optimizer_faults;
mod pipeline;
mod power;
mod rig;
mod store;
mod survey;
mod swapper;
mod tiles;
mod trace;
mod view;
mod volumes;
mod wishes;
