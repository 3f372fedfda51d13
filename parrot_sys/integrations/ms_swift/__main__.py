"""Prints the plugin file of ms-swift.

swift sft --external_plugins "$(python -m parrot_sys.integrations.ms_swift)" --model DIR --tuner_type full ...
"""

from __future__ import annotations

from pathlib import Path

if __name__ == "__main__":
    print(Path(__file__).with_name("ms_swift_plugin.py"))
