//! Text that others say metrics in: Prometheus and OpenMetrics text, Influx line protocol. Both are read as hostile
//! input: lines are bounded by the body, nothing is allocated ahead of what is there, and a bad line costs that line.

pub mod exposition;
pub mod influx;
