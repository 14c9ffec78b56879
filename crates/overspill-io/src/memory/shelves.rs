//! How the arena is laid out in blocks, and which of them an order gets.
//!
//! Plain data: [`Shelves`] is the layout, fixed at start, and [`Free`] the blocks that nobody holds. An order names
//! the shelf of each of its blocks; it is served from those very shelves, whole or not at all.

use std::fmt;

use super::BLOCK_ALIGNMENT;
use super::pool::PoolError;

/// A number of equal blocks, named after the one who holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockClass {
    /// Who holds such blocks; refusals name it.
    pub name: &'static str,
    /// Largest lease that a block of this class serves, in bytes.
    pub block_bytes: usize,
    /// Number of blocks.
    pub count: usize,
}

/// The blocks of every class, class by class, by rising block size.
pub(super) struct Shelves {
    shelves: Vec<Shelf>,
    bytes: usize,
}

/// The blocks of one class, side by side in the arena.
struct Shelf {
    class: BlockClass,
    /// Offset of the first block in the arena.
    start: usize,
    /// Distance between the starts of neighboring blocks.
    stride: usize,
}

/// One block of one shelf.
#[derive(Clone, Copy)]
pub(super) struct Place {
    shelf: usize,
    index: usize,
}

/// The blocks that nobody holds.
pub(super) struct Free {
    /// Indices by shelf; the block returned last, whose lines may still be cached, is taken first.
    shelves: Vec<Vec<usize>>,
}

impl Free {
    pub(super) fn put_back(&mut self, Place { shelf, index }: Place) {
        self.shelves[shelf].push(index);
    }
}

/// Requests that are to be served together, and the shelf of each.
pub(super) struct Order<'a> {
    bytes: &'a [usize],
    shelves: Vec<usize>,
    /// How many blocks of each shelf that makes.
    wanted: Vec<usize>,
}

impl Shelves {
    /// Lays the classes out side by side; those of one size become one, under the first one's name.
    pub(super) fn lay_out(classes: &[BlockClass]) -> Result<Shelves, PoolError> {
        let classes = merged(classes)?;
        let beyond =
            || PoolError::Arena { bytes: usize::MAX, errno: rustix::io::Errno::NOMEM.raw_os_error() };
        let mut shelves = Vec::new();
        let mut end = 0_usize;
        for class in classes {
            let stride = class.block_bytes.checked_next_multiple_of(BLOCK_ALIGNMENT).ok_or_else(beyond)?;
            let bytes = stride.checked_mul(class.count).ok_or_else(beyond)?;
            shelves.push(Shelf { class, start: end, stride });
            end = end.checked_add(bytes).ok_or_else(beyond)?;
        }
        Ok(Shelves { shelves, bytes: end })
    }

    /// Bytes of all blocks together.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn all_free(&self) -> Free {
        Free { shelves: self.shelves.iter().map(|shelf| (0..shelf.class.count).rev().collect()).collect() }
    }

    /// Number of blocks that are not free.
    pub(super) fn leased(&self, free: &Free) -> usize {
        self.shelves.iter().zip(&free.shelves).map(|(shelf, free)| shelf.class.count - free.len()).sum()
    }

    /// Where in the arena the block begins, of which its holder uses `bytes` bytes.
    pub(super) fn offset(&self, place: Place, bytes: usize) -> usize {
        let Shelf { class, start, stride } = &self.shelves[place.shelf];
        assert!(bytes <= class.block_bytes, "{bytes} bytes of a block of class `{}`", class.name);
        start + place.index * stride
    }

    /// Finds the shelf of each request: the smallest blocks that serve it.
    pub(super) fn order<'a>(&self, bytes: &'a [usize]) -> Result<Order<'a>, PoolError> {
        let largest = self.shelves.last().map_or(0, |shelf| shelf.class.block_bytes);
        let mut order = Order { bytes, shelves: Vec::new(), wanted: vec![0; self.shelves.len()] };
        for &bytes in bytes {
            let shelf = self.shelves.partition_point(|shelf| shelf.class.block_bytes < bytes);
            *order.wanted.get_mut(shelf).ok_or(PoolError::TooLarge { bytes, largest })? += 1;
            order.shelves.push(shelf);
        }
        Ok(order)
    }

    /// Whether the order could be served if every block were free.
    pub(super) fn can_serve(&self, order: &Order<'_>) -> bool {
        self.shelves.iter().zip(&order.wanted).all(|(shelf, &wanted)| wanted <= shelf.class.count)
    }

    /// Takes a free block for every request of the order, or nothing.
    pub(super) fn take(&self, free: &mut Free, order: &Order<'_>) -> Result<Vec<Place>, PoolError> {
        let lacks = |&shelf: &usize| free.shelves[shelf].len() < order.wanted[shelf];
        if let Some(at) = order.shelves.iter().position(lacks) {
            let shelf = order.shelves[at];
            let BlockClass { name, count, .. } = self.shelves[shelf].class;
            return Err(PoolError::Exhausted {
                bytes: order.bytes[at],
                class: name,
                count,
                leased: count - free.shelves[shelf].len(),
                wanted: order.wanted[shelf],
            });
        }
        let take = |&shelf: &usize| {
            let index = free.shelves[shelf].pop().expect("the shelf has as many as wanted");
            Place { shelf, index }
        };
        Ok(order.shelves.iter().map(take).collect())
    }
}

impl fmt::Debug for Shelves {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.shelves.iter().map(|shelf| &shelf.class)).finish()
    }
}

/// The classes by rising block size, each size once.
fn merged(classes: &[BlockClass]) -> Result<Vec<BlockClass>, PoolError> {
    let empty = |BlockClass { name, block_bytes, count }| PoolError::EmptyClass { name, block_bytes, count };
    let mut classes = classes.to_vec();
    classes.sort_by_key(|class| class.block_bytes);
    let mut merged: Vec<BlockClass> = Vec::new();
    for class in classes {
        match merged.last_mut() {
            _ if class.block_bytes == 0 => return Err(empty(class)),
            Some(last) if last.block_bytes == class.block_bytes => {
                last.count = last.count.saturating_add(class.count);
            }
            _ => merged.push(class),
        }
    }
    if merged.iter().any(|class| class.count > 0) {
        return Ok(merged);
    }
    Err(empty(merged.first().copied().unwrap_or(BlockClass { name: "", block_bytes: 0, count: 0 })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Pool;

    const SMALL: BlockClass = BlockClass { name: "small", block_bytes: 4096, count: 2 };
    const LARGE: BlockClass = BlockClass { name: "large", block_bytes: 10_000, count: 1 };

    #[test]
    fn classes_of_one_size_are_one_class() {
        let more = BlockClass { name: "more", block_bytes: 4096, count: 3 };
        let pool = Pool::new(&[SMALL, more]).unwrap();
        assert_eq!(pool.try_lease_all(&[4096; 5]).unwrap().len(), 5);
        assert_eq!(pool.report().total_bytes, 5 * 4096);
    }

    #[test]
    fn the_total_is_the_sum_and_not_a_power_of_two() {
        let class = BlockClass { name: "odd", block_bytes: 3 * 4096 + 1, count: 7 };
        assert_eq!(Pool::new(&[class]).unwrap().report().total_bytes, 7 * 4 * 4096);
    }

    #[test]
    fn a_pool_without_blocks_is_refused() {
        let none = BlockClass { count: 0, ..SMALL };
        let hollow = BlockClass { block_bytes: 0, ..SMALL };
        let immense = BlockClass { count: usize::MAX, ..LARGE };
        assert!(matches!(Pool::new(&[]), Err(PoolError::EmptyClass { name: "", .. })));
        assert!(matches!(Pool::new(&[none]), Err(PoolError::EmptyClass { name: "small", count: 0, .. })));
        assert!(matches!(Pool::new(&[LARGE, hollow]), Err(PoolError::EmptyClass { block_bytes: 0, .. })));
        assert!(matches!(Pool::new(&[immense]), Err(PoolError::Arena { .. })));
    }
}
