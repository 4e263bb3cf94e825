"""Everyday dialogues with blanks: what DialogSum's samples are filled in from.

A script has slots with their fillings, turns (each a tuple of wordings, spoken by the two persons in turn), and three
summaries of the same content.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Script:
    """One situation, to be filled in."""

    topic: str
    slots: dict[str, tuple[str, ...]]
    turns: tuple[tuple[str, ...], ...]
    summaries: tuple[str, str, str]


SCRIPTS = (
    Script(
        "bicycle repair",
        {
            "part": ("back brake", "chain", "front wheel", "gear lever"),
            "price": ("15", "18", "24", "30"),
            "day": ("Tuesday", "Wednesday", "Friday", "Saturday"),
            "ride": ("a ride along the canal", "a tour with my club", "my way to work", "a race"),
        },
        (
            ("Good morning. What can I do for you?", "Hello, how can I help?"),
            (
                "Hi. There is something wrong with the {part} of my bicycle. It makes a terrible noise.",
                "Hello. The {part} of my bicycle has been making a strange noise since last week.",
            ),
            ("Let me have a look. Oh, I see. The {part} is worn out. You need a new one.",),
            ("I was afraid of that. How much will it cost?", "Oh no. Is it expensive?"),
            ("The part and the work come to {price} pounds together.",),
            ("That is all right. When can I pick it up? I need it for {ride}.",),
            ("We are quite busy at the moment, but I can have it ready by {day}.",),
            ("{day} is fine. Do I have to pay now?", "Great, {day} suits me. Shall I pay in advance?"),
            ("No, you can pay when you collect it. Here is your ticket.",),
            ("Thank you very much. See you on {day}.",),
        ),
        (
            "#Person2# brings a bicycle with a worn {part} to #Person1#'s shop. #Person1# will repair it for "
            "{price} pounds by {day}.",
            "#Person1# tells #Person2# that the {part} of the bicycle needs to be replaced and that it will be ready "
            "on {day}.",
            "#Person2#'s bicycle makes a noise. #Person1# will change the {part} for {price} pounds.",
        ),
    ),
    Script(
        "lost luggage",
        {
            "city": ("Lisbon", "Oslo", "Vienna", "Dublin"),
            "colour": ("green", "dark blue", "red", "grey"),
            "item": ("my presentation", "the gifts for my nephews", "my medicine", "a suit for a wedding"),
            "hotel": ("Harbour Hotel", "Station Inn", "Linden Hotel", "Park Lodge"),
        },
        (
            ("Excuse me, is this the desk for lost luggage?", "Excuse me, I think my suitcase is lost."),
            ("Yes, it is. Which flight were you on?", "I'm sorry to hear that. Where did you fly from?"),
            (
                "I came from {city} this afternoon. I have waited for an hour and my suitcase is still not here.",
            ),
            ("Could you describe it to me, please?", "I see. What does it look like?"),
            (
                "It is a large {colour} suitcase with a leather label. I must have it tonight, because {item} is in it.",
            ),
            (
                "Let me check the computer. It seems your suitcase is still in {city}. It will come on the next flight.",
            ),
            ("How annoying! What am I supposed to do now?", "That is really bad news. What happens next?"),
            ("We will bring it to you free of charge. Where are you staying?",),
            ("At the {hotel}, near the main square.", "I'm staying at the {hotel}."),
            ("You will have it before midnight. We are very sorry for the trouble.",),
        ),
        (
            "#Person1#'s {colour} suitcase was left in {city}. #Person2# promises to bring it to the {hotel} before "
            "midnight.",
            "#Person1# reports a lost suitcase to #Person2# and is upset. #Person2# finds that it is still in {city} and "
            "will send it to the {hotel}.",
            "#Person2# helps #Person1# find a suitcase that did not arrive from {city}.",
        ),
    ),
    Script(
        "piano lessons",
        {
            "child": ("Emma", "Leo", "Nina", "Oscar"),
            "age": ("six", "seven", "nine", "eleven"),
            "weekday": ("Monday", "Tuesday", "Thursday", "Friday"),
            "fee": ("20", "25", "28", "32"),
        },
        (
            ("Hello, I'm calling about the piano lessons you offer.", "Hello, are you the piano teacher?"),
            ("Yes, of course. Are the lessons for you?", "Yes, I am. Do you want to learn the piano?"),
            ("No, they are for my child {child}, who is {age} years old and can't wait to start.",),
            ("That's a good age to begin. Do you have a piano at home?",),
            ("Not yet. Is that a problem?", "No, we don't. Should we buy one?"),
            ("You can borrow an electric one from us for the first months. It's good enough for beginners.",),
            ("That is very kind. How much do you charge?", "Wonderful. And what does a lesson cost?"),
            ("A lesson of forty-five minutes is {fee} dollars, and the first one is free.",),
            ("Sounds good. {child} has time on {weekday} afternoon.",),
            ("Then let's meet next {weekday} at four o'clock.", "{weekday} at four would be perfect for me."),
        ),
        (
            "#Person1# calls #Person2# to arrange piano lessons for {child}. The first lesson is free and takes place "
            "next {weekday}.",
            "#Person2# tells #Person1# about the piano lessons and lends an electric piano. {child} will start on "
            "{weekday}.",
            "#Person1# wants {child} to learn the piano, and #Person2# agrees to teach {child} for {fee} dollars a lesson.",
        ),
    ),
    Script(
        "weekend hike",
        {
            "friend": ("Maria", "Tom", "Yuki", "Ahmed"),
            "place": ("the old mill", "the waterfall", "the lighthouse", "the castle ruins"),
            "length": ("eight", "ten", "twelve", "fifteen"),
            "bring": ("sandwiches", "a map", "raincoats", "some fruit"),
        },
        (
            (
                "{friend}, do you have any plans for the weekend?",
                "What are you doing this weekend, {friend}?",
            ),
            ("Nothing special. I thought I would just clean the flat.", "Not really. Why do you ask?"),
            ("Some of us are going to walk to {place}. Why don't you join us?",),
            ("How far is it? You know I'm not very fit.", "Is it a long way? I haven't walked much lately."),
            ("It's about {length} kilometers, but the path is flat and we will take our time.",),
            ("What if it rains? The weather has been awful all week.",),
            ("The forecast says it will be sunny on Sunday. If it rains, we'll go to the cinema instead.",),
            ("All right, you have talked me into it. Shall I bring anything?",),
            ("You could bring {bring}. We'll meet at the bus stop at nine.",),
            ("Perfect. I'm looking forward to it.", "OK, see you at nine."),
        ),
        (
            "#Person1# invites {friend} to walk to {place} at the weekend. {friend} worries about the distance and the "
            "weather but agrees to come.",
            "{friend} has no plans for the weekend and will go hiking with #Person1# and bring {bring}.",
            "#Person1# persuades {friend} to join a walk of {length} kilometers to {place}.",
        ),
    ),
    Script(
        "job interview",
        {
            "job": ("librarian", "gardener", "shop assistant", "laboratory assistant"),
            "years": ("two", "three", "four", "five"),
            "reason": (
                "my family has moved here",
                "I want to learn something new",
                "the way to work is too long",
            ),
            "start": ("in May", "next month", "in two weeks", "after the holidays"),
        },
        (
            ("Please take a seat. You have applied for the job as a {job}, right?",),
            (
                "Yes, that's right. Thank you for inviting me.",
                "Yes. I'm glad to have the chance to talk to you.",
            ),
            ("Could you tell me something about your experience?", "What have you done so far?"),
            ("I have worked as a {job} for {years} years in a small town in the north.",),
            ("And why do you want to leave your present job?", "Why would you like to change?"),
            ("I like my colleagues very much, but {reason}.",),
            ("I understand. We sometimes have to work on Saturdays. Would you mind that?",),
            ("Not at all, as long as I know it some days before.", "No problem. I have done that before."),
            ("Very good. When would you be able to start?",),
            ("I could start {start}.", "If everything goes well, {start}."),
            ("Thank you. We will let you know by the end of the week.",),
        ),
        (
            "#Person1# interviews #Person2# for a job as a {job}. #Person2# has {years} years of experience and could "
            "start {start}.",
            "#Person2# applies for a job as a {job} and tells #Person1# about the experience and the reason for the "
            "change. #Person1# will decide by the end of the week.",
            "#Person2# has an interview with #Person1# and doesn't mind working on Saturdays.",
        ),
    ),
    Script(
        "noisy neighbour",
        {
            "noise": ("loud music", "the barking of your dog", "drilling", "drum practice"),
            "time": ("eleven at night", "midnight", "six in the morning", "five in the morning"),
            "job": ("a nurse", "a taxi driver", "a baker", "a pilot"),
            "gift": ("some cake", "a bottle of juice", "some flowers", "a box of chocolates"),
        },
        (
            ("Hello, I live in the flat below you. Do you have a minute?",),
            ("Sure. Is there anything wrong?", "Of course. What is the matter?"),
            ("I don't want to complain, but {noise} at {time} is too much for me.",),
            ("Oh, I'm so sorry. I didn't know you could hear it downstairs.",),
            ("The walls are very thin. I'm {job}, and I need my sleep.",),
            ("I understand. I have only lived here since last month and did not think of it.",),
            (
                "It would be enough if it stopped until eight in the morning.",
                "Could you keep it quiet during the night?",
            ),
            ("That's only fair. I promise it will not happen again.", "Of course. You have my word."),
            ("Thank you for being so kind about it.", "I really appreciate that."),
            ("Please come in. Let me offer you {gift} to make up for it.",),
        ),
        (
            "#Person1# complains to #Person2# about {noise} at {time}. #Person2# apologizes and promises to be quiet.",
            "#Person1#, {job}, cannot sleep because of #Person2#'s noise. #Person2# is sorry and offers #Person1# {gift}.",
            "#Person2# did not know that #Person1# could hear the noise and promises that it will not happen again.",
        ),
    ),
    Script(
        "restaurant reservation",
        {
            "people": ("four", "five", "six", "eight"),
            "evening": ("Thursday", "Friday", "Saturday", "Sunday"),
            "name": ("Brennan", "Keller", "Okafor", "Lindqvist"),
            "party": (
                "my father's birthday",
                "our anniversary",
                "my sister's graduation",
                "a farewell party",
            ),
        },
        (
            ("Good evening, Garden Restaurant. How may I help you?", "Garden Restaurant, good evening."),
            ("I would like to book a table for {people} people on {evening} evening, please.",),
            ("What time would you like to come?", "Certainly. At what time?"),
            ("At half past seven, if that is possible.", "Around half past seven."),
            ("I'm afraid we are fully booked at that time. There is a table at half past eight.",),
            (
                "That is a little late, but all right. Could we have a table by the window? It is for {party}.",
            ),
            ("I will see what I can do. May I have your name?", "Of course. What name is it?"),
            ("The name is {name}. Do you have any dishes without meat?",),
            ("Yes, there is a separate page of them in our menu, {name}.",),
            ("Wonderful. See you on {evening}.", "That's great. Thank you for your help."),
        ),
        (
            "#Person2# books a table for {people} people on {evening} evening for {party}. #Person1# can only offer "
            "half past eight.",
            "#Person2# calls the Garden Restaurant to reserve a table by the window for {party}.",
            "#Person1# takes a reservation for {people} people on {evening} under the name {name}.",
        ),
    ),
    Script(
        "doctor's advice",
        {
            "pain": ("My back hurts", "I have a headache", "My neck is stiff", "My eyes are sore"),
            "since": ("since last Sunday", "for two weeks", "since I moved house", "for several days"),
            "hours": ("nine", "ten", "eleven", "twelve"),
            "sport": ("swimming", "yoga", "dancing", "walking"),
        },
        (
            ("What seems to be the trouble?", "Good afternoon. What brings you here?"),
            ("{pain}, doctor. It has been like this {since}.",),
            ("Does it get worse at a certain time of the day?", "When is it at its worst?"),
            ("It is worst in the evening, after work.", "Mostly in the evening, when I come home."),
            ("How long do you sit at your desk every day?",),
            ("About {hours} hours. We have a lot to do at the office now.",),
            ("That is far too long. You should get up once an hour and move about.",),
            ("Do I need any medicine?", "Aren't you going to give me any medicine?"),
            ("Not for now. Try {sport} twice a week, and come back if it doesn't get better.",),
            ("I will try. Thank you, doctor.", "OK, I'll follow your advice."),
        ),
        (
            "#Person2# goes to see #Person1# about a pain. #Person1# thinks #Person2# sits too long and advises {sport}.",
            "#Person1# advises #Person2# to move about every hour and to try {sport} instead of taking medicine.",
            "#Person2# sits at a desk for {hours} hours a day and doesn't feel well. #Person1# gives some advice.",
        ),
    ),
    Script(
        "library card",
        {
            "books": ("five", "six", "eight", "ten"),
            "weeks": ("two", "three", "four"),
            "fine": ("10", "20", "25", "50"),
            "subject": ("astronomy", "cooking", "local history", "chess"),
        },
        (
            ("Hi, I'm new in town and I would like to get a library card.",),
            ("You're welcome. Could you fill in this form, please?", "Sure. Please fill in this form first."),
            ("Here you are. How many books can I borrow at a time?",),
            ("You can take {books} books for {weeks} weeks. You can renew them once.",),
            ("And what if I forget to bring them back?", "What happens if I'm late?"),
            ("Then you have to pay {fine} cents a day for each book.",),
            ("I will try to remember. Where can I find books about {subject}?",),
            ("They are upstairs, on the left, next to the reading room.",),
            ("Is it all right to use my own computer in the reading room?",),
            ("Yes, but please switch off the sound.", "Of course, as long as you are quiet."),
        ),
        (
            "#Person1# gets a library card. #Person2# explains that #Person1# can borrow {books} books for {weeks} weeks.",
            "#Person2# tells #Person1# the rules of the library and where the books about {subject} are.",
            "#Person1# is new in town and asks #Person2# about borrowing books and the fine for being late.",
        ),
    ),
    Script(
        "cooking together",
        {
            "dish": ("vegetable soup", "mushroom pie", "fish curry", "lentil stew"),
            "missing": ("onions", "salt", "cream", "garlic"),
            "minutes": ("twenty", "thirty", "forty", "fifty"),
            "guest": ("your parents", "our neighbors", "my boss", "Aunt Clara"),
        },
        (
            ("What shall we cook tonight? {guest} will be here at seven.",),
            ("How about {dish}? Everybody likes it.", "Let's make {dish}. It's easy and good."),
            ("Good idea. Do we have everything we need?", "Sounds delicious. What do we need for it?"),
            ("Let me look. We have run out of {missing}. Could you go to the shop?",),
            ("OK, I'll go right now. Do you want anything else?",),
            ("Some bread, please. I'll start washing the vegetables.",),
            ("How long does it take until it is done?", "How long will it have to cook?"),
            ("About {minutes} minutes. So don't chat with everyone you meet.",),
            ("I won't. And who is going to set the table?",),
            ("You are, of course. I'm the cook tonight.", "We can do that together when you are back."),
        ),
        (
            "#Person1# and #Person2# will cook {dish} for {guest}. #Person1# goes to the shop because they have no {missing}.",
            "#Person2# suggests making {dish} tonight and asks #Person1# to buy {missing} and some bread.",
            "#Person1# and #Person2# are preparing dinner for {guest}, who will come at seven.",
        ),
    ),
    Script(
        "renting a room",
        {
            "rent": ("380", "420", "450", "510"),
            "floor": ("second", "third", "fourth", "top"),
            "pet": ("a cat", "a small dog", "two goldfish", "a parrot"),
            "month": ("March", "June", "September", "October"),
        },
        (
            ("Hello, I saw your advertisement. Is the room still free?",),
            ("Yes, it is. It's on the {floor} floor. Would you like to see it?",),
            ("I'd love to. How much is the rent?", "Yes, please. What is the rent?"),
            ("It's {rent} euros a month, with heating and water.",),
            ("Is it quiet? I'm a student and I have to study a lot.",),
            (
                "Very quiet. The window looks out on the garden.",
                "It is. You only hear the birds in the garden.",
            ),
            ("I also have {pet}. Would that be a problem?",),
            ("Not for me, but I have to ask the other tenants.",),
            ("I see. I could move in at the beginning of {month}.",),
            ("That would be fine. I'll call you tomorrow and tell you what they say about {pet}.",),
        ),
        (
            "#Person1# is interested in #Person2#'s room, which costs {rent} euros a month. #Person2# will ask the other "
            "tenants about {pet}.",
            "#Person2# shows #Person1# a quiet room on the {floor} floor. #Person1# could move in in {month}.",
            "#Person1# wants to rent a room and has {pet}. #Person2# will call #Person1# tomorrow.",
        ),
    ),
    Script(
        "computer problem",
        {
            "file": ("report", "essay", "thesis", "travel plan"),
            "deadline": ("this evening", "tomorrow morning", "at noon", "on Friday"),
            "helper": ("Daniel", "Sophie", "Ravi", "Grace"),
            "cause": ("the battery was empty", "I spilled some tea on it", "it fell off the table"),
        },
        (
            ("{helper}, could you help me? My computer won't start any more.",),
            ("What happened? Did you do anything to it?", "Calm down. What did you do?"),
            ("I don't know. I think {cause}. And my {file} is on it!",),
            ("Didn't you make a copy of it?", "You must have a copy somewhere, don't you?"),
            ("No, I always forget to. I have to hand in the {file} {deadline}.",),
            ("Let me try something. I'll take out the disk and connect it to my computer.",),
            ("Do you think that will work?", "Is there any hope?"),
            ("Look, here it is. Your {file} is still there.",),
            ("You have saved my life, {helper}. I don't know how to thank you.",),
            ("Just promise me to make copies from now on.", "Buy me lunch, and make a copy next time."),
        ),
        (
            "#Person1#'s computer doesn't start, and the {file} is due {deadline}. {helper} manages to rescue it.",
            "{helper} helps #Person1# get the {file} back and tells #Person1# to make copies in the future.",
            "#Person1# has no copy of the {file}, but {helper} finds it on the disk.",
        ),
    ),
)
