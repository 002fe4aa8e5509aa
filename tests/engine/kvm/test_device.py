"""Opening /dev/kvm, and what is said where that fails."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from engine.kvm.fake import FakeKernel
from ringfence.engine.kvm.abi import Cap, Request
from ringfence.engine.kvm.device import NEEDED, HostKernel, System
from ringfence.errors import HostError


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOENT, "module kvm_amd or kvm_intel"),
        (errno.ENODEV, "module kvm_amd or kvm_intel"),
        (errno.EACCES, "join the group"),
        (errno.EPERM, "allow this container"),
        (errno.EMFILE, "kernel log"),
    ],
)
def test_the_device_can_t_be_opened(code: int, advice: str) -> None:
    with pytest.raises(HostError, match=advice) as found:
        System(FakeKernel(open_error=code))
    assert "--engine translate" in str(found.value)


@pytest.mark.parametrize("cap", NEEDED)
def test_a_missing_capability_is_named(cap: Cap) -> None:
    kernel = FakeKernel(missing={cap})
    with pytest.raises(HostError, match=f"lacks {cap.name}: use Linux"):
        System(kernel)
    assert kernel.closed


def test_another_version() -> None:
    with pytest.raises(HostError, match="version 11, expected 12"):
        System(FakeKernel(version=11))


def test_a_refused_request_is_named() -> None:
    with pytest.raises(HostError, match="can't create a machine: Device or resource busy"):
        System(FakeKernel(refused={Request.CREATE_VM: errno.EBUSY})).create_vm()
    vm = System(FakeKernel(refused={Request.CREATE_VCPU: errno.ENOMEM})).create_vm()
    with pytest.raises(HostError, match="KVM_CREATE_VCPU: Cannot allocate memory"):
        vm.create_vcpu(0)


def test_registers_that_kvm_lacks_are_named() -> None:
    class Forgetful(FakeKernel):
        def _set_msrs(self, table: object) -> int:
            return 1

    vcpu = System(Forgetful()).create_vm().create_vcpu(0)
    with pytest.raises(HostError, match="KVM_SET_MSRS stopped at MSR 0x22"):
        vcpu.set_msrs([(0x11, 0), (0x22, 0)])


def test_an_error_of_the_real_kernel_has_its_number(tmp_path: Path) -> None:
    kernel = HostKernel()
    target = tmp_path / "file"
    target.touch()
    fd = kernel.open(str(target))
    with pytest.raises(OSError, match="Inappropriate ioctl") as found:
        kernel.ioctl(fd, Request.GET_API_VERSION)
    assert found.value.errno == errno.ENOTTY
    kernel.close(fd)
