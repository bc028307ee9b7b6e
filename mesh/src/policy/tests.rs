//! What policies mean, one sentence at a time.
