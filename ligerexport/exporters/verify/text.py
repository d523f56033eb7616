"""The text that every build is verified on: prose that names things twice, figures, code, and other alphabets."""

PROMPT = """\
The harbour master of Vessby kept two books. In the first, bound in green cloth, she wrote the name of every \
ship that tied up at the north quay, its length in feet, and the hour at which it had passed the light. In \
the second she wrote what the ships had brought: salt from Setúbal, tar, rope, forty barrels of lamp oil, a \
piano that nobody had ordered. On the morning of 14 March 1907 the steamer Aurelia Lindqvist came in at 6:42 \
with 318 tons of coal and one passenger, a boy of eleven with a letter in his coat. The letter was addressed \
to the harbour master herself. She read it standing, then sat down and read it again, and for the first time \
in nineteen years she left a line of the green book empty.

"You may stay until the ice is gone," she told him. His name was Tomas. He learned the books quickly: by \
June he could add a column of figures faster than the clerk, and by August he had found the mistake of 1903, \
when the Perpetua had been written down as leaving before she arrived. He asked why the line of 14 March was \
empty. The harbour master looked at the light for a while before she answered. "Because I did not yet know," \
she said, "what the Aurelia Lindqvist had brought."

Report of the station, summer: 41 ships in June, 57 in July, 63 in August, 161 in all; mean length 212.4 \
feet. Dues collected: 1,204.50 crowns. Water at the quay 13.7 °C on the first of each month, wind mostly \
from the south-west.

def tonnage(ships):
    total = 0
    for ship in ships:
        if ship["quay"] == "north" and ship["tons"] > 0:
            total += ship["tons"]
    return total

Years later a visitor asked Tomas, who was harbour master of Vessby then, where the green book had gone. He \
showed her the shelf. Καλημέρα, said a card between the pages; 港口, said another. The visitor turned to 14 \
March 1907. The line was no longer empty. In a boy's careful hand it read: Aurelia Lindqvist, 6:42, from the \
north, carrying Tomas.
"""
