//! qkv
