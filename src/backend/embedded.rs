//! The single-machine backend: SQLite, and a local worker.
