//! What the service tells of itself: health, models, providers.

pub mod routes;
