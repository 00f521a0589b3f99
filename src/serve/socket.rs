//! System calls and socket options: making, parking and filtering listeners, aborting connections.
//!
//! One of the files where `unsafe` is allowed; who calls when is decided elsewhere.
