# The front door. `make help` says what there is.
#
# Everything built lands in build/. Kernels and templates are kept by content in the cache
# (WARREN_CACHE, else $XDG_CACHE_HOME/warren, else ~/.cache/warren), so a fresh clone builds them once.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

B       := build
TARGET  := target/x86_64-unknown-linux-gnu/release
SCRIPT  ?=
ARGS    ?=
PEER    ?=
PARTS   ?=
export SCRIPT ARGS PEER

.PHONY: help package bench-sentinel run up down test soak fuzz sanitize image bench deps peers build binaries kernels templates node config-check fmt lint clean

help:
	@cat <<-END
	make run [SCRIPT=x.py ARGS="a b"]  boot a node in QEMU, run a Python script in a microVM (exit code: see README)
	make up, make down                 the same node in the background (build/run/control.sock), and its end
	make test                          everything that is checked before a change goes in
	make soak                          hours of kills, cycles and power cuts (WARREN_SOAK_KILLS=500)
	make image                         build/warren.img: a disk image that boots under UEFI
	make package                       build/warren-sentinel.tar.gz: the sentinel for other Linux hosts
	make bench [PEER=/path/firecracker] [PARTS="cycle net"] build/bench.tsv: how fast, how big
	make bench-sentinel                build/bench-sentinel.tsv: the sentinel beside vmagent and Prometheus
	make fuzz MINUTES=10 [NAMES="a b"] every fuzz target with coverage feedback and AddressSanitizer
	make sanitize                      devices, memory and parsers under AddressSanitizer
	make build                         all parts: binaries, kernels, templates
	make kernels, templates, binaries  one kind of part
	make fmt, lint                     format, and check, the Rust code
	make deps                          install the Debian packages needed (as root)
	make clean                         remove build/ and target/; the cache stays
	END

run: build
	@image/run

up: build
	@image/up

down:
	@image/down

deps:
	@image/deps

# Programs that the tests talk to, unpacked into the cache: nothing that the node or its build needs.
peers: deps
	@image/peers

# --- parts -----------------------------------------------------------------------------------------------------

build: node $(B)/templates.img $(B)/data.img
node: $(B)/bzImage $(B)/host-initramfs.img
kernels: $(B)/vmlinux $(B)/bzImage
templates: $(B)/templates/base/manifest.toml $(B)/templates/scratch/manifest.toml $(B)/templates/python/manifest.toml $(B)/templates/code/manifest.toml

# cargo knows best what is out of date; a copy is made only when the binary changed, so nothing after it is rebuilt.
binaries: deps
	@mkdir -p $(B)
	start=$$SECONDS
	if [ -t 2 ]; then cargo build --release --locked; else cargo build --release --locked -q; fi
	for b in warren burrow mason; do cmp -s $(TARGET)/$$b $(B)/$$b || install -m 755 $(TARGET)/$$b $(B)/$$b; done
	echo "binaries: $(B)/warren ($$(stat -c %s $(B)/warren) bytes), $(B)/burrow ($$(stat -c %s $(B)/burrow) bytes), $$((SECONDS - start)) s"

$(B)/warren $(B)/burrow $(B)/mason: binaries
	@:

$(B)/vmlinux: kernel-config/build kernel-config/guest.config | deps
	@kernel-config/build guest $(B)
	touch $@
$(B)/bzImage: kernel-config/build kernel-config/host.config kernel-config/host-qemu.config kernel-config/host-qemu.patch | deps
	@kernel-config/build host-qemu $(B)
	touch $@
$(B)/hardware/bzImage: kernel-config/build kernel-config/host.config kernel-config/host-hardware.config | deps
	@kernel-config/build host-hardware $(B)/hardware
	touch $@

$(B)/templates/scratch/manifest.toml: rootfs/scratch rootfs/ext4-image | deps
	@rootfs/scratch $(B)/templates/scratch
	touch $@
$(B)/templates/%/manifest.toml: rootfs/template rootfs/ext4-image rootfs/debian-packages rootfs/templates/%/* | deps
	@rootfs/template $* $(B)/templates/$*
	touch $@
$(B)/templates.img: rootfs/template-disk $(B)/templates/python/manifest.toml
	@rootfs/template-disk $@ $(B)/templates/python
# A disk of its own: it is large, and importing it takes time that nodes without it need not spend.
$(B)/code.img: rootfs/template-disk $(B)/templates/code/manifest.toml
	@rootfs/template-disk $@ $(B)/templates/code
$(B)/templates/code/manifest.toml: rootfs/templates/python/*
$(B)/data.img: rootfs/data-filesystem | deps
	@mkdir -p $(B)
	rootfs/data-filesystem $@

$(B)/initramfs.img: rootfs/guest-initramfs $(B)/burrow
	@rootfs/guest-initramfs $(B)/burrow $@
$(B)/builder.img: rootfs/guest-initramfs $(B)/burrow $(B)/mason
	@rootfs/guest-initramfs $(B)/burrow $@ $(B)/mason
HOST_PARTS = $(B)/warren $(B)/vmlinux $(B)/initramfs.img $(B)/builder.img $(B)/templates/base/manifest.toml \
    $(B)/templates/scratch/manifest.toml \
    rootfs/host-initramfs $(shell find rootfs/host -type f)
$(B)/host-initramfs.img: $(HOST_PARTS)
	@rootfs/host-initramfs $(B) $@ none

# --- image -----------------------------------------------------------------------------------------------------

image: $(B)/warren.img
$(B)/hardware/initramfs.img: $(HOST_PARTS) $(B)/hardware/bzImage
	@rootfs/host-initramfs $(B) $@ zstd
$(B)/warren.img: image/build image/uki $(B)/hardware/bzImage $(B)/hardware/initramfs.img $(B)/data.img
	@image/build $(B)/hardware/bzImage $(B)/hardware/initramfs.img $(B)/data.img $@

# Images by others' programs, for the tests that build templates.
$(B)/images: image/test-images | peers
	@mkdir -p $(B)
	image/test-images $@

# The same image with the QEMU profile's kernel: what the tests boot under UEFI, so that they need not build a kernel for
# every machine there is.
$(B)/qemu.img: image/build image/uki $(B)/bzImage $(B)/host-initramfs.img $(B)/data.img
	@image/build $(B)/bzImage $(B)/host-initramfs.img $(B)/data.img $@

# The sentinel alone, for other Linux hosts.
package: binaries
	@packaging/sentinel/package $(B)/warren $(B)/warren-sentinel.tar.gz

# --- checks ----------------------------------------------------------------------------------------------------

fmt: deps
	@cargo fmt --all

lint: deps
	@cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -q -- -D warnings
	echo "lint: clean"

config-check: deps
	@kernel-config/test

test: lint config-check peers build $(B)/code.img $(B)/qemu.img $(B)/images
	@code=0
	cargo test --locked -q --no-fail-fast || code=$$?
	qemu-tests/run || code=$$?
	if [ $$code = 0 ]; then echo "test: all passed"; else echo "test: some failed, see above"; exit $$code; fi

# For hours: the tests of recovery and snapshots with many kills, cycles, copies and power cuts.
soak: build $(B)/code.img
	@WARREN_SOAK_KILLS=$${WARREN_SOAK_KILLS:-500} WARREN_SOAK_CYCLES=$${WARREN_SOAK_CYCLES:-1000} \
	    WARREN_SOAK_CUTS=$${WARREN_SOAK_CUTS:-40} WARREN_SOAK_WRITES=$${WARREN_SOAK_WRITES:-200} \
	    WARREN_SOAK_WRITE_BOOTS=$${WARREN_SOAK_WRITE_BOOTS:-10} \
	    WARREN_SOAK_FAULTS=$${WARREN_SOAK_FAULTS:-1} WARREN_SOAK_PAUSES=$${WARREN_SOAK_PAUSES:-100} \
	    WARREN_SOAK_CHAIN=$${WARREN_SOAK_CHAIN:-20} WARREN_SOAK_FORKS=$${WARREN_SOAK_FORKS:-50} \
	    cargo test -p qemu-tests --locked --test recovery --test snapshot_faults --test snapshot_life \
	    --test snapshot_memory -- --test-threads=1 --nocapture

# Coverage-guided, on the one stable toolchain: see fuzz/build and docs/testing.md.
MINUTES ?= 10
NAMES   ?=
fuzz: deps
	@fuzz/build "$$PWD/target/fuzz"
	fuzz/run target/fuzz/x86_64-unknown-linux-gnu/release $(B)/fuzz $(MINUTES) $(NAMES)

sanitize: deps
	@fuzz/sanitize "$$PWD/target/sanitize"

bench: build $(B)/code.img $(B)/images
	@cargo build --release --locked -q -p qemu-tests --bins
	$(TARGET)/bench $(PARTS)

# Outside of QEMU: the peers' programs run in the same minutes, and ratios to them are what counts.
bench-sentinel: peers
	@mkdir -p $(B)
	cargo test --release --locked -q --test sentinel measure -- --ignored --nocapture --test-threads=1 |
	    sed -n 's/^.*ROW\t//p' | tee $(B)/bench-sentinel.tsv

clean:
	@image/down
	rm -rf $(B) target
