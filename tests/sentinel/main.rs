//! The sentinel as a process: started, killed, cut off, restarted, against receivers of our own and real peers.

#![allow(clippy::unwrap_used)] // a failure is the finding

mod buffer;
mod clickhouse;
mod commands;
mod config;
mod container;
mod core;
mod decode;
mod exporter;
mod measure;
mod metrics;
mod modbus;
mod peers;
mod process;
mod prometheus;
mod receiver;
mod snmp_many;
mod snmpd;
mod snmpsim;
mod survival;
mod tls;
