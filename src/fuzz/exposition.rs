use crate::sentinel::formats::exposition::{Line, lines, series};

/// Whatever a target says, a series that was found can be taken apart or is none, and what was taken apart is part of it.
pub fn exposition(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    for openmetrics in [false, true] {
        for line in lines(&text, openmetrics) {
            let Ok(Line::Sample { series: raw, .. }) = line else { continue };
            assert!(!raw.is_empty() && text.contains(raw));
            if let Some((name, labels)) = series(raw) {
                assert!(raw.starts_with(name));
                // Unescaping makes nothing longer.
                assert!(labels.iter().map(|(label, value)| label.len() + value.len()).sum::<usize>() <= raw.len());
            }
        }
    }
}
