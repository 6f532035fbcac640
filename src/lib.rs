//! Inkstone.
