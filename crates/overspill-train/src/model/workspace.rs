//! What a call allocates at its peak, from shapes alone.
//!
//! Every stage lists the matrices that are alive in it; the code it mirrors is in `layer`, `attention` and `head`.
//! Two things come on top. A product first makes its result twice, because burn moves it into aligned memory; and
//! while it runs, it packs its operands. Both never happen at once.

use super::BatchShape;
use super::attention::block_queries;
use super::head::{chunk_tokens, slice_rows};
use crate::config::ModelConfig;

/// Products pack their operands in panels of at most this depth.
const PACKED_DEPTH_MAX: usize = 512;

/// Beside all rows of the left operand, at most this many columns of the right one are packed.
const PACKED_COLUMNS_MAX: usize = 1024;

/// Handles, task queues and other small things.
const SMALL_BYTES: usize = 64 << 10;

/// See [`Model::workspace_bytes`](super::Model::workspace_bytes).
pub(super) fn bytes(config: &ModelConfig, shape: BatchShape) -> usize {
    let sizes = Sizes::new(config, shape);
    let elements = sizes.layer_forward().max(sizes.layer_backward()).max(sizes.head_backward());
    elements * size_of::<f32>() + SMALL_BYTES
}

/// Elements of the matrices that calls make.
struct Sizes {
    /// A row for every token: the residual stream, queries, keys (or values), feed-forward.
    hidden: usize,
    query: usize,
    kv: usize,
    ffn: usize,
    /// A layer's largest matrix.
    parameter: usize,
    /// Packed operands of a layer's largest product with a parameter, and for a parameter's gradient.
    packing: usize,
    gradient_packing: usize,
    attention: AttentionSizes,
    head: HeadSizes,
}

/// Elements of the matrices that attention makes for a block of queries and all keys of a sequence.
struct AttentionSizes {
    query: usize,
    keys: usize,
    scores: usize,
}

/// Elements of the matrices that the head makes for a chunk of tokens.
struct HeadSizes {
    logits: usize,
    part: usize,
    packing: usize,
}

impl Sizes {
    fn new(config: &ModelConfig, shape: BatchShape) -> Self {
        let tokens = shape.tokens();
        let (hidden, query, ffn) = (config.hidden, config.query_width(), config.ffn);
        let width = hidden.max(query).max(ffn);
        let block = block_queries(config, shape.seq);
        let chunk = chunk_tokens(config.vocab, tokens);
        let slice = slice_rows(config.vocab, hidden);
        Self {
            hidden: tokens * hidden,
            query: tokens * query,
            kv: tokens * config.kv_width(),
            ffn: tokens * ffn,
            parameter: hidden * ffn.max(query),
            packing: packing(tokens, width, width),
            gradient_packing: packing(width, width, tokens),
            attention: AttentionSizes {
                query: block * query,
                keys: shape.seq * config.kv_width(),
                scores: block * shape.seq * config.heads,
            },
            head: HeadSizes {
                logits: chunk * config.vocab,
                part: chunk.max(slice) * hidden,
                packing: packing(chunk, hidden, config.vocab).max(packing(slice, hidden, chunk)),
            },
        }
    }

    fn layer_forward(&self) -> usize {
        let (h, q, kv, ffn) = (self.hidden, self.query, self.kv, self.ffn);
        let project = h + q + 2 * kv + self.on_top(q.max(kv));
        let attend = q + 2 * kv + q + self.attention.forward();
        let activate = h + h + 2 * ffn + self.on_top(ffn);
        let output = h + ffn + h + self.on_top(h);
        project.max(attend).max(activate).max(output)
    }

    fn layer_backward(&self) -> usize {
        let (h, q, kv, ffn) = (self.hidden, self.query, self.kv, self.ffn);
        // Norm, projections, attended values and middle wait while the feed-forward part goes back.
        let waiting = h + (q + 2 * kv) + q + h;
        let gradient = self.parameter + self.parameter.max(self.gradient_packing);
        let activate = waiting + h + 3 * ffn + self.on_top(ffn).max(gradient);
        let feed_forward = waiting + 3 * h + 2 * ffn + self.on_top(h);
        let attend = 2 * h + (q + 2 * kv) + q + (q + 2 * kv) + self.attention.backward();
        let project = 3 * h + (q + 2 * kv) + gradient.max(h + self.on_top(h));
        activate.max(feed_forward).max(attend).max(project)
    }

    fn head_backward(&self) -> usize {
        let HeadSizes { logits, part, packing } = self.head;
        2 * self.hidden + logits + logits.max(2 * part).max(part + packing)
    }

    /// What a product with a parameter allocates beside its result, which has this many elements.
    fn on_top(&self, product: usize) -> usize {
        product.max(self.packing)
    }
}

impl AttentionSizes {
    fn forward(&self) -> usize {
        let Self { query, keys, scores } = *self;
        2 * keys + query + scores + self.on_top(scores).max(query + self.on_top(query))
    }

    fn backward(&self) -> usize {
        let Self { query, keys, scores } = *self;
        let scores_gradient = scores + self.on_top(scores);
        let operand_gradient = query.max(keys) + self.on_top(query.max(keys));
        4 * keys + 2 * query + scores + scores_gradient.max(scores + operand_gradient)
    }

    /// The packed operands of all groups together are at most one block of scores and all keys.
    fn on_top(&self, product: usize) -> usize {
        product.max(self.scores + self.keys)
    }
}

/// Packed operands of a product `[rows, depth] · [depth, columns]`.
fn packing(rows: usize, columns: usize, depth: usize) -> usize {
    PACKED_DEPTH_MAX.min(depth) * (rows + PACKED_COLUMNS_MAX.min(columns))
}
