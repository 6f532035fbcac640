//! New ids: 32 hex characters, the first 12 of them the time (so that rows sort by age), the rest random.

/// A new id at `now_ms`. Random bits come from the runtime's cryptographic source.
#[must_use]
pub fn new_id(now_ms: i64) -> String {
    let mut random = [0_u8; 10];
    // The runtime's source does not fail; if it ever did, the time alone would still make the id, and a clash would be
    // refused by the primary key it is used for.
    let _ = getrandom::fill(&mut random);
    format!("{:012x}{}", now_ms.max(0) & 0xffff_ffff_ffff, hex::encode(random))
}
