//! Rows of the benchmark: what `node-bench` measures on the node and `bench` writes.
