//! The NBD protocol: messages, state machines, an async client and an async server.
