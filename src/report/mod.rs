//! What people and programs see: text, progress, JSON and exit codes.
