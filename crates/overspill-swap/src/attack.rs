//! Manifests that nobody wrote: one generator for the fuzzer and for the tests.
//!
//! Bytes are read as a program that makes a manifest file: a sound one whose body is changed here and there, fields of
//! nearly the right shape, or the bytes as they are. The checksum is computed anew after every change, so that what is
//! wrong gets past it. [`manifest`] decodes what came of it, and panics when that breaks a promise: what is refused is
//! refused with an error, and what is decoded is sound, stays what it is, and is a state that a ledger can go on from.
//!
//! With the feature `fuzz` this is public, for the targets in `fuzz/`.

use overspill_io::Stripes;
use serde_json::{Value, json};

use crate::extent::EXTENT_ALIGNMENT;
use crate::ledger::{Durability, Ledger, Worth};
use crate::manifest::{LaneRecord, Manifest, TensorRecord, checksum};

/// Makes a manifest file of `program` and checks what reading it leads to.
///
/// # Panics
/// When a promise is broken.
pub fn manifest(program: &[u8]) {
    check(&file(&mut Program(program)));
}

/// Bytes that decide; zeros when they are used up.
struct Program<'a>(&'a [u8]);

impl Program<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn below(&mut self, bound: usize) -> usize {
        (usize::from(self.byte()) << 8 | usize::from(self.byte())) % bound.max(1)
    }

    /// A number of the kinds that break things, or a small one.
    fn number(&mut self) -> u64 {
        let small = u64::from(self.byte());
        match self.byte() % 8 {
            0 => small,
            1 => u64::MAX - small,
            2 => i64::MAX as u64 - small,
            3 => (1 << 63) + small,
            4 => (1 << (small % 52)) * EXTENT_ALIGNMENT,
            _ => small * EXTENT_ALIGNMENT,
        }
    }
}

fn file(program: &mut Program<'_>) -> Vec<u8> {
    let version = 1 + u32::from(program.byte() % 2);
    match program.byte() % 4 {
        0 => program.0.to_vec(),
        1 => sealed(version, program.0),
        2 => {
            let mut body = body(version, &sound(program));
            let changes = program.below(8);
            (0..changes).for_each(|_| change(&mut body, program));
            sealed(version, &body)
        }
        _ => sealed(version, odd(program).to_string().as_bytes()),
    }
}

/// A file with this body, as if somebody had meant it.
fn sealed(version: u32, body: &[u8]) -> Vec<u8> {
    let mut file = format!("overspill manifest {version} {:016x}\n", checksum(body)).into_bytes();
    file.extend_from_slice(body);
    file
}

/// The body that this version writes.
fn body(version: u32, manifest: &Manifest) -> Vec<u8> {
    let value = match version {
        1 => json!({ "tensors": manifest.tensors }),
        _ => json!(manifest),
    };
    value.to_string().into_bytes()
}

/// A manifest that a store could have written.
fn sound(program: &mut Program<'_>) -> Manifest {
    let mut offset = 0;
    let tensor = |index| {
        let length = program.below(3 * EXTENT_ALIGNMENT as usize) as u64;
        offset += u64::from(program.byte() % 3) * EXTENT_ALIGNMENT;
        let (name, checksum) = (format!("weights/layer {index}/0"), program.number());
        let record = TensorRecord { name, offset, length, checksum };
        offset += length.max(1).next_multiple_of(EXTENT_ALIGNMENT);
        record
    };
    let tensors: Vec<_> = (0..5).map(tensor).collect();
    let lane = |index| LaneRecord { file: format!("data.{index}"), weight: 1 + u32::from(program.byte()) };
    let lanes: Vec<_> = (0..2).map(lane).collect();
    let meta =
        json!({ "step": program.number(), "run": { "--lr": "0.002" }, "odd": [null, true, "ü\n\"", -1] });
    let manifest =
        Manifest { generation: 7, capacity_bytes: offset, meta, lanes, tensors, ..Manifest::default() };
    assert_eq!(Manifest::decode(&manifest.encode()).as_ref(), Ok(&manifest), "what is sound is read");
    manifest
}

/// What a body is made of, and what breaks one.
const PIECES: [&[u8]; 16] = [
    b"0",
    b"-1",
    b"1.5",
    b"1e400",
    b"18446744073709551615",
    b"18446744073709551616",
    b"9223372036854775807",
    b"null",
    b"true",
    b"\"",
    b"\"name\":",
    b"{}",
    b"[",
    b"]",
    b",",
    b"\xff",
];

/// Changes a body in one place.
fn change(body: &mut Vec<u8>, program: &mut Program<'_>) {
    let (from, length) = (program.below(body.len()), program.below(24));
    let end = (from + length).min(body.len());
    match program.byte() % 6 {
        0 => {
            if let Some(byte) = body.get_mut(from) {
                *byte ^= 1 << (program.byte() % 8);
            }
        }
        1 => drop(body.drain(from..end)),
        2 => body.truncate(from),
        3 => {
            let copy = body[from..end].to_vec();
            let to = program.below(body.len() + 1);
            body.splice(to..to, copy);
        }
        4 => {
            let piece = PIECES[program.below(PIECES.len())];
            body.splice(from..from, piece.iter().copied());
        }
        _ => {
            // A number, wherever the next one is, becomes another.
            let is_digit = |byte: &u8| byte.is_ascii_digit();
            let first = body[from..].iter().position(is_digit).map_or(body.len(), |at| from + at);
            let digits = body[first..].iter().take_while(|byte| is_digit(byte)).count();
            body.splice(first..first + digits, program.number().to_string().into_bytes());
        }
    }
}

/// Fields of nearly the right shape.
fn odd(program: &mut Program<'_>) -> Value {
    let mut manifest = json!(sound(program));
    for _ in 0..program.below(4) {
        let fields = [
            "store",
            "generation",
            "capacity_bytes",
            "bytes_written",
            "meta",
            "stripe_bytes",
            "lanes",
            "tensors",
        ];
        let field = fields[program.below(fields.len())];
        let value = odd_value(program, 3);
        match program.byte() % 4 {
            0 => drop(manifest.as_object_mut().and_then(|fields| fields.remove(field))),
            1 => manifest["unknown"] = value,
            _ => manifest[field] = value,
        }
    }
    let records = manifest["tensors"].as_array().map_or(0, Vec::len);
    for _ in 0..program.below(4) {
        let (record, field) = (program.below(records), program.below(4));
        let value = match program.byte() % 3 {
            0 => odd_value(program, 1),
            _ => json!(program.number()),
        };
        if let Some(record) = manifest["tensors"].get_mut(record).filter(|record| record.is_object()) {
            record[["name", "offset", "length", "checksum"][field]] = value;
        }
    }
    manifest
}

fn odd_value(program: &mut Program<'_>, depth: usize) -> Value {
    match program.byte() % if depth > 0 { 9 } else { 6 } {
        0 => Value::Null,
        1 => json!(program.byte().is_multiple_of(2)),
        2 => json!(program.number()),
        3 => json!(-1 - i64::from(program.byte())),
        4 => json!(f64::from(program.byte()) / 7.0),
        5 => json!("weights/layer 0/0"),
        6 => (0..program.byte() % 4).map(|_| odd_value(program, depth - 1)).collect(),
        7 => json!([{ "file": "data", "weight": program.number() }]),
        _ => json!([{ "name": "a", "offset": program.number(), "length": program.number(), "checksum": 1 }]),
    }
}

/// What holds of every file, whoever made it.
fn check(file: &[u8]) {
    let Ok(manifest) = Manifest::decode(file) else { return };
    assert_eq!(Manifest::decode(&manifest.encode()).as_ref(), Ok(&manifest), "what is read can be written");
    let tensors = &manifest.tensors;
    let capacity = manifest.capacity();
    assert!(capacity.is_multiple_of(EXTENT_ALIGNMENT) && i64::try_from(capacity).is_ok());
    let mut names: Vec<_> = tensors.iter().map(|tensor| &tensor.name).collect();
    names.sort_unstable();
    assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "names are unique");
    let extent = |tensor: &TensorRecord| tensor.extent().expect("extents are possible");
    let mut extents: Vec<_> = tensors.iter().map(extent).collect();
    extents.sort_unstable();
    assert!(extents.windows(2).all(|pair| pair[0].end() <= pair[1].offset), "extents are disjoint");
    for (extent, tensor) in tensors.iter().map(|tensor| (extent(tensor), tensor)) {
        let is_aligned =
            [extent.offset, extent.length].iter().all(|bytes| bytes.is_multiple_of(EXTENT_ALIGNMENT));
        assert!(is_aligned && extent.length >= tensor.length && extent.end() <= capacity);
    }
    let weights: Vec<u32> = manifest.lanes.iter().map(|lane| lane.weight).collect();
    let stripes = Stripes::new(manifest.stripe_bytes, &weights).expect("stripes can be dealt");
    let dealt = (0..weights.len()).map(|lane| u128::from(stripes.lane_bytes(lane, capacity))).sum::<u128>();
    assert!(dealt >= u128::from(capacity), "every byte has a place");
    for durability in [Durability::Step, Durability::None] {
        go_on(&manifest, capacity, durability);
    }
}

/// Opens the state, takes a snapshot of it, and writes every tensor once more.
fn go_on(manifest: &Manifest, capacity: u64, durability: Durability) {
    let mut ledger =
        Ledger::restore(durability, capacity, &manifest.tensors).expect("a ledger goes on from it");
    assert_eq!(ledger.committed_records(), manifest.tensors, "nothing else is committed");
    ledger.pin("same", &manifest.tensors).expect("a snapshot shares what it is of");
    // Another manifest's snapshot fits or is refused.
    let other = sound(&mut Program(&[3; 64]));
    let is_pinned = ledger.pin("other", &other.tensors).is_ok();
    assert_eq!(ledger.unpin("other"), is_pinned);
    for tensor in &manifest.tensors {
        let key = ledger.find(&tensor.name).expect("it was restored");
        if let Err(full) = ledger.begin_write(key) {
            ledger.grow(ledger.extents().capacity().saturating_add(full.requested));
            let begun = ledger.begin_write(key).expect("it has just grown by as much");
            assert!(!begun.committed_version_lost, "a snapshot's bytes are not written to");
        }
        ledger.end_write(key, !tensor.checksum);
    }
    assert!(ledger.reserve("weights of somebody else", 1, Worth::State).is_ok());
    assert!(ledger.records().is_ok());
    ledger.commit();
    assert!(ledger.unpin("same"));
    let held: u64 =
        ledger.committed_records().iter().filter_map(TensorRecord::extent).map(|e| e.length).sum();
    assert_eq!(ledger.extents().free_bytes() + held, ledger.extents().capacity(), "the rest is free");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

        #[test]
        fn no_manifest_breaks_a_promise(program in prop::collection::vec(any::<u8>(), 0..200)) {
            manifest(&program);
        }
    }

    #[test]
    fn the_generator_makes_what_is_read_and_what_is_refused_for_many_reasons() {
        let mut reasons = std::collections::BTreeSet::new();
        let mut state = 1_u64;
        for _ in 0..20_000 {
            let program: Vec<u8> = std::iter::repeat_with(|| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
            .take(120)
            .collect();
            reasons.insert(match Manifest::decode(&file(&mut Program(&program))) {
                Ok(manifest) => format!("read, {} tensors", manifest.tensors.len()),
                Err(error) => {
                    error.to_string().split(|c: char| !c.is_ascii_alphabetic()).collect::<Vec<_>>().join(" ")
                }
            });
        }
        for reason in [
            "read, 5",
            "overlap",
            "listed twice",
            "impossible extent",
            "unknown field",
            "no data files",
            "not a manifest",
        ] {
            assert!(reasons.iter().any(|found| found.contains(reason)), "{reason} is not among {reasons:#?}");
        }
    }
}
