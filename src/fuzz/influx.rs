use crate::sentinel::formats::influx::point;

/// Whatever a plugin says, a line is a point or an error, and no part of a point is longer than the line.
pub fn influx(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    for line in text.split('\n') {
        if let Some(Ok(point)) = point(line) {
            let parts = point.tags.iter().map(|(key, value)| key.len() + value.len());
            let fields = point.fields.iter().map(|(key, _)| key.len());
            assert!(point.measurement.len() + parts.chain(fields).sum::<usize>() <= line.len());
            assert!(!point.measurement.is_empty());
        }
    }
}
