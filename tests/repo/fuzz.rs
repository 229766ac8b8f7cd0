//! Any bytes, for the formats at rest.

use crate::drive::drive;

#[test]
fn any_bytes_leave_the_formats_at_rest_sound() {
    drive("format", nbdbackup::repo::fuzz::format);
}
