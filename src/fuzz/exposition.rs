use crate::sentinel::formats::exposition::{Expected, Line, line, lines, series};

/// Whatever a target says, a series that was found can be taken apart or is none, and what was taken apart is part of it;
/// and a line is the same one whatever was expected there.
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
        let found = |line| match line {
            Ok(Line::Sample { series, .. }) => Some(series),
            _ => None,
        };
        let all: Vec<&str> = lines(&text, openmetrics).filter_map(found).take(8).collect();
        for raw in text.split('\n').take(64) {
            // A NaN is not equal to itself.
            let plain = format!("{:?}", line(raw, openmetrics, None));
            for series in &all {
                let half = (0..=series.len() / 2).rev().find(|&at| series.is_char_boundary(at)).unwrap_or(0);
                let expected = Expected { shared: &series[..half], rest: &series[half..] };
                assert_eq!(format!("{:?}", line(raw, openmetrics, Some(expected))), plain);
            }
        }
    }
}
