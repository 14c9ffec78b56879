//! What tests of backends need: memory, files, and transfers as a driver cuts them.

use std::sync::Arc;

use super::Backend as _;
use super::Transfer;
use super::doorbell::Doorbell;
use super::threads::Threads;
use crate::engine::extent::Extent;
use crate::engine::queue::{Limits, Priority, Queue};
use crate::error::Direction;
use crate::file::File;
use crate::{BlockClass, Pool};

/// How many bytes a transfer moves.
pub(crate) const CHUNK: usize = 4096;

/// A pool, and a file of each kind that needs no disk.
pub(crate) struct Bed {
    pub(crate) pool: Pool,
    /// In memory, and empty.
    pub(crate) file: File,
    /// Behind the page cache, as far as backends can tell; reads as zeros.
    pub(crate) zeros: File,
}

impl Bed {
    /// With memory for as many transfers as there are `blocks`.
    pub(crate) fn new(blocks: usize) -> Bed {
        let pool = Pool::new(&[BlockClass { name: "test", block_bytes: CHUNK, count: blocks }]).unwrap();
        let doorbell: Arc<Doorbell> = Arc::clone(Threads::without_workers(1).0.doorbell());
        let file = File::in_memory(&doorbell).unwrap();
        let zeros = File::open("/dev/zero".as_ref(), &doorbell).unwrap();
        Bed { pool, file, zeros }
    }

    /// A transfer of a block full of ones at `offset` of the file in memory.
    pub(crate) fn transfer(&self, direction: Direction, offset: u64) -> Transfer {
        self.transfer_of(&self.file, direction, offset)
    }

    /// The same for any file.
    pub(crate) fn transfer_of(&self, file: &File, direction: Direction, offset: u64) -> Transfer {
        let mut queue = Queue::new(CHUNK, Limits { depth: 1, bytes: CHUNK, detours: 1 });
        queue.push((), Extent { length: CHUNK, offset: 0, alignment: 1, priority: Priority::Urgent });
        let (chunk, ()) = queue.next().unwrap();
        let mut block = self.pool.try_lease(CHUNK).unwrap();
        block.fill(1);
        Transfer { chunk, direction, file: file.clone(), offset, block, detour: None }
    }
}
